"""Padded batches with a mask, against transformers given the same ids and mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from families import save_model
from orin_kit.errors import UserError
from orin_kit.export.export import export
from orin_kit.runtime.padding import score_padded, unpadded
from orin_kit.runtime.runtime import open_runtime

LENGTHS = (5, 31, 17)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp(request.param)
    model = save_model(directory / "hf", request.param)
    export(directory / "hf", directory / "onnx", progress=False)
    return model, directory / "onnx"


def batch(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Random ids `[3, 31]`, padded on a side with a token that means something elsewhere, and the mask."""
    rng, mask = np.random.default_rng(), np.zeros((3, 31), np.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, 31 - length :] = 1
    if side == "right":
        mask = mask[:, ::-1].copy()
    return np.where(mask, rng.integers(0, 2048, mask.shape), 7), mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_and_prefill_equal_transformers(exported: tuple[PreTrainedModel, Path], side: str) -> None:
    model, onnx = exported
    ids, mask = batch(side)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    backend = open_runtime(onnx, max_len=64, batch_size=3, threads=1).backend
    got = score_padded(backend, ids, mask)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs((got - expected)[mask == 1]).max() <= 1e-3
    assert not got[mask == 0].any()

    last = [int(np.flatnonzero(row)[-1]) for row in mask]
    assert np.abs(backend.prefill(unpadded(ids, mask)) - expected[range(3), last]).max() <= 1e-3


def test_a_left_padded_batch_goes_on_as_generate_does(exported: tuple[PreTrainedModel, Path]) -> None:
    model, onnx = exported
    ids, mask = batch("left")
    expected = model.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=20, do_sample=False, pad_token_id=7
    )[:, 31:].numpy()
    backend = open_runtime(onnx, max_len=64, batch_size=3, threads=1).backend
    tokens = [backend.prefill(unpadded(ids, mask)).argmax(-1)]
    while len(tokens) < 20:
        tokens.append(backend.decode(tokens[-1]).argmax(-1))
    np.testing.assert_array_equal(np.stack(tokens, 1), expected)


def test_without_a_mask_every_id_is_a_token() -> None:
    ids = np.array([[1, 2], [3, 4]])
    assert unpadded(ids) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 1, 1], [0, 0, 0]], "row 1 of the batch has no tokens"),
        ([[1, 0, 1], [1, 1, 1]], "row 0 of the batch has padding between its tokens"),
        ([[1, 1], [1, 1]], r"mask is \[2, 2\], the ids are \[2, 3\]"),
    ],
)
def test_a_mask_that_means_nothing(mask: list[list[int]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        unpadded(np.ones((2, 3), np.int64), np.array(mask))
