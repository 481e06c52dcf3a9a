"""The backend's convolution states: bounded, never rewound, emptied row by row, and reused by the next turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from families import save_model
from orin_kit.export.export import export
from orin_kit.models.spec import read_spec
from orin_kit.runtime.backends.onnx import OnnxBackend
from orin_kit.runtime.generator import Generator
from orin_kit.runtime.sampler import Sampling

Exported = tuple[PreTrainedModel, Path]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    directory = tmp_path_factory.mktemp("conv")
    model = save_model(directory / "hf", "conv")
    export(directory / "hf", directory / "onnx", progress=False)
    return model, directory / "onnx"


def open_backend(exported: Exported, batch_size: int = 1) -> OnnxBackend:
    return OnnxBackend(exported[1], max_len=200, batch_size=batch_size, threads=1)


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng().integers(0, 2048, length).tolist()


def agrees(logits: np.ndarray, exported: Exported, tokens: list[int]) -> bool:
    """Whether logits `[vocab]` are transformers' after these tokens."""
    with torch.no_grad():
        expected = exported[0](torch.tensor([tokens])).logits[0, -1].numpy()
    return bool(np.abs(logits - expected).max() <= TOLERANCE)


def test_memory_is_two_states_whatever_the_length(exported: Exported) -> None:
    state = read_spec(exported[1]).conv_state_bytes(4)
    backend = open_backend(exported)
    assert backend.memory()["kv_cache"] == 2 * state
    backend.prefill([prompt_of(150)])
    backend.reset(3)
    assert backend.memory()["kv_cache"] == 3 * 2 * state


@pytest.mark.parametrize("pieces", [(1, 1, 1, 40), (30, 30), (100,), (7, 2, 60, 1)])
def test_any_pieces_make_one_text(exported: Exported, pieces: tuple[int, ...]) -> None:
    """Shorter and longer than the kernel of 24."""
    backend = open_backend(exported)
    tokens: list[int] = []
    for size in pieces:
        piece = prompt_of(size)
        tokens += piece
        assert agrees(backend.prefill([piece])[0], exported, tokens)


def test_a_reset_scored_or_truncated_cache_begins_anew(exported: Exported) -> None:
    backend = open_backend(exported)
    backend.prefill([prompt_of(50)])
    assert backend.truncate(60) == backend.truncate(50) == 50
    assert backend.truncate(49) == 0 == backend.lengths[0]
    tokens = prompt_of(10)
    assert agrees(backend.prefill([tokens])[0], exported, tokens)
    backend.reset()
    assert agrees(backend.prefill([tokens])[0], exported, tokens)
    backend.score(np.array([prompt_of(33)]))
    assert backend.lengths.tolist() == [0]
    assert agrees(backend.prefill([tokens])[0], exported, tokens)


def test_truncating_empties_only_the_rows_that_are_longer(exported: Exported) -> None:
    rows = [prompt_of(n) for n in (40, 12, 29)]
    backend = open_backend(exported, batch_size=3)
    backend.prefill(rows)
    assert backend.truncate(29) == 29
    assert backend.lengths.tolist() == [0, 12, 29]
    rows[0] = []
    for _ in range(30):  # more than a kernel
        following = prompt_of(3)
        rows = [[*row, token] for row, token in zip(rows, following, strict=True)]
        logits = backend.decode(np.array(following))
    assert all(agrees(logits[row], exported, tokens) for row, tokens in enumerate(rows))


def test_a_step_that_fails_leaves_the_state_as_it_was(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt_of(30)
    backend = open_backend(exported)
    backend.prefill([tokens])

    def interrupted(counts: np.ndarray) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_commit", interrupted)  # after the graph ran, the worst moment
        with pytest.raises(KeyboardInterrupt):
            backend.decode(np.array([7]))
    assert backend.lengths.tolist() == [30]
    assert agrees(backend.decode(np.array([9]))[0], exported, [*tokens, 9])


def test_a_growing_chat_costs_only_its_new_tokens_and_an_edited_one_everything(exported: Exported) -> None:
    generator = Generator(open_backend(exported), ())
    first = prompt_of(50)
    said = list(generator.stream(first, Sampling(), max_new_tokens=20))
    second = first + said + prompt_of(9)
    for prompt, reused in ((second, 69), (second, 0), (first[:20], 0)):
        fresh = Generator(open_backend(exported), ())
        expected = list(fresh.stream(prompt, Sampling(), max_new_tokens=15))
        assert list(generator.stream(prompt, Sampling(), max_new_tokens=15)) == expected
        assert generator.stats is not None and generator.stats.reused_tokens == reused


def test_greedy_over_64_tokens_is_transformers_generate(exported: Exported) -> None:
    prompt = prompt_of(40)
    reference = exported[0].generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0, 40:].tolist()
    said = list(Generator(open_backend(exported), ()).stream(prompt, Sampling(), max_new_tokens=64))
    assert said == reference
