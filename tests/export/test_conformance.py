"""Every dialect and family against transformers: prefill, decode, greedy text, ragged batches, the model's cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from families import FAMILIES, first_step, save_model
from orin_kit.export.export import export
from orin_kit.runtime.runtime import open_runtime

TOLERANCE = 1e-3  # max abs error of fp32 logits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    directory = tmp_path_factory.mktemp(request.param)
    model = save_model(directory / "hf", request.param, seed=hash(request.param) % 1000)
    export(directory / "hf", directory / "onnx", progress=False)
    return model, directory


def reference_logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def test_prefill_then_decode_agree_with_transformers(family: tuple[torch.nn.Module, Path]) -> None:
    model, directory = family
    rng = np.random.default_rng()
    ids = rng.integers(0, 2048, (1, 150))
    expected = reference_logits(model, ids)[0]
    backend = open_runtime(directory / "onnx", max_len=160).backend
    worst = np.abs(backend.prefill([ids[0, :134].tolist()])[0] - expected[133]).max()
    for at in range(134, 150):
        worst = max(worst, np.abs(backend.decode(ids[:, at])[0] - expected[at]).max())
    assert worst <= TOLERANCE, worst
    assert np.abs(backend.score(ids)[0] - expected).max() <= TOLERANCE


def test_greedy_continuation_is_identical(family: tuple[torch.nn.Module, Path]) -> None:
    model, directory = family
    prompt = np.random.default_rng(1).integers(0, 2048, 20)
    expected = model.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 20:].tolist()
    backend = open_runtime(directory / "onnx", max_len=128).backend
    logits, said = backend.prefill([prompt.tolist()]), []
    for _ in range(64):
        said.append(int(logits[0].argmax()))
        logits = backend.decode(np.array([said[-1]]))
    assert said == expected


def test_ragged_batch_equals_single_rows(family: tuple[torch.nn.Module, Path]) -> None:
    model, directory = family
    rng = np.random.default_rng()
    rows = [rng.integers(0, 2048, n).tolist() for n in (5, 31, 17)]
    more = rng.integers(0, 2048, (3, 4))
    backend = open_runtime(directory / "onnx", max_len=64, batch_size=3).backend
    got = [backend.prefill(rows)] + [backend.decode(more[:, i]) for i in range(4)]
    for row, tokens in enumerate(rows):
        whole = np.array([tokens + more[row].tolist()])
        expected = reference_logits(model, whole)[0]
        for step in range(5):
            assert np.abs(got[step][row] - expected[len(tokens) - 1 + step]).max() <= TOLERANCE


def test_prompt_in_pieces_and_truncation_equal_one_piece(family: tuple[torch.nn.Module, Path]) -> None:
    model, directory = family
    ids = np.random.default_rng().integers(0, 2048, (1, 40))
    expected = reference_logits(model, ids)[0]
    backend = open_runtime(directory / "onnx", max_len=64).backend
    backend.prefill([ids[0, :10].tolist()])
    backend.prefill([[1, 2, 3, 4, 5]])  # to be forgotten
    kept = backend.truncate(10)
    assert kept == (0 if model.config.model_type == "lfm2" else 10) == backend.lengths[0]
    assert np.abs(backend.prefill([ids[0, kept:33].tolist()])[0] - expected[32]).max() <= TOLERANCE
    assert np.abs(backend.prefill([ids[0, 33:].tolist()])[0] - expected[39]).max() <= TOLERANCE


def test_reference_dialect_in_onnx_reference(family: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    """onnx's own interpreter, standard operators only, prefill and one decode step on a ragged batch."""
    model, directory = family
    export(directory / "hf", tmp_path / "ref", dialect="reference", max_len=64, progress=False)
    evaluator = ReferenceEvaluator(str(tmp_path / "ref" / "model.onnx"))
    rng = np.random.default_rng()
    ids = rng.integers(0, 2048, (2, 12))
    lengths, following = np.array([12, 7]), rng.integers(0, 2048, (2, 1))
    feed = first_step(evaluator, ids, lengths)
    logits, *present = evaluator.run(None, feed)
    caches = [name for name in feed if name.startswith("past_") and name != "past_lengths"]
    feed |= dict(zip(caches, present, strict=True))
    feed |= {"input_ids": following, "past_lengths": lengths, "logit_positions": np.zeros((2, 1), np.int64)}
    feed |= {"input_lengths": np.ones(2, np.int64)} if "input_lengths" in feed else {}
    decoded = evaluator.run(None, feed)[0]
    for row, length in enumerate(lengths):
        whole = np.concatenate([ids[row, :length], following[row]])[None]
        expected = reference_logits(model, whole)[0]
        assert np.abs(logits[row, :length] - expected[:length]).max() <= TOLERANCE
        assert np.abs(decoded[row, 0] - expected[length]).max() <= TOLERANCE


def test_fp16_graph_is_near_fp32(family: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, directory = family
    export(directory / "hf", tmp_path / "fp16", precision="fp16", progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 24))
    expected = reference_logits(model, ids)[0]
    backend = open_runtime(tmp_path / "fp16", max_len=64).backend
    got = backend.score(ids)[0]
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
