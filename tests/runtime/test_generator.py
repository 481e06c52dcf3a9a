"""The generator against transformers' generate on an exported model, and its prefix bookkeeping under interruptions."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from families import save_model
from orin_kit.errors import OrinKitError, UserError
from orin_kit.export.export import export
from orin_kit.runtime.backends.onnx import OnnxBackend
from orin_kit.runtime.generator import Generator
from orin_kit.runtime.sampler import Sampling

GREEDY = Sampling()
VOCAB = 2048


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny random Qwen2 in both forms: transformers' model and the ONNX artifact."""
    directory = tmp_path_factory.mktemp("generator")
    model = save_model(directory / "hf", "qwen2")
    export(directory / "hf", directory / "onnx", progress=False)
    return SimpleNamespace(model=model, onnx=directory / "onnx")


def open_backend(exported: SimpleNamespace, max_len: int = 256) -> OnnxBackend:
    return OnnxBackend(Path(exported.onnx), max_len=max_len, threads=1)


def prompt_of(length: int, seed: int | None = None) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, VOCAB, length)]


def answer(backend: OnnxBackend, ids: list[int], count: int, **options: object) -> list[int]:
    return list(Generator(backend, ()).stream(ids, Sampling(**options), max_new_tokens=count))  # type: ignore[arg-type]


def test_greedy_over_64_tokens_is_transformers_generate(exported: SimpleNamespace) -> None:
    for seed, length in enumerate([1, 40]):
        ids = prompt_of(length, seed)
        with torch.no_grad():
            reference = exported.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)
        assert answer(open_backend(exported), ids, 64) == reference[0, length:].tolist()


def test_greedy_takes_the_references_best_token_on_fresh_prompts(exported: SimpleNamespace) -> None:
    ids = prompt_of(30)
    tokens = answer(open_backend(exported), ids, 100, repetition_penalty=1.2)
    with torch.no_grad():
        logits = exported.model(torch.tensor([ids + tokens])).logits[0].numpy()
    for step, token in enumerate(tokens):
        row, seen = logits[len(ids) + step - 1], np.unique(ids + tokens[:step])
        row[seen] = np.where(row[seen] < 0, row[seen] * 1.2, row[seen] / 1.2)
        assert row[token] >= row.max() - 1e-3  # two nearly equal tokens may change places


def test_a_next_turn_costs_only_its_new_tokens_and_says_the_same(exported: SimpleNamespace) -> None:
    generator = Generator(open_backend(exported), ())
    first = prompt_of(50, 1)
    said = list(generator.stream(first, GREEDY, max_new_tokens=20))
    assert generator.stats is not None and generator.stats.reused_tokens == 0
    # The last token given out was never fed, so of 70 known tokens 69 are cached.
    assert generator.cached_ids == tuple(first + said[:-1])
    second = first + said + prompt_of(9, 2)
    again = list(generator.stream(second, GREEDY, max_new_tokens=30))
    assert generator.stats.prompt_tokens == 79
    assert generator.stats.reused_tokens == 69
    assert again == answer(open_backend(exported), second, 30)
    # The same prompt again: one token at least must be fed to have logits.
    assert list(generator.stream(second, GREEDY, max_new_tokens=30)) == again
    assert generator.stats.reused_tokens == 78
    # And a prompt that is shorter than, or departs from, what the cache holds.
    for other in (first[:20], first[:30] + prompt_of(11, 3), prompt_of(25, 4)):
        assert list(generator.stream(other, GREEDY, max_new_tokens=30)) == answer(open_backend(exported), other, 30)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_closed_answer_leaves_the_cache_good(exported: SimpleNamespace, taken: int) -> None:
    generator = Generator(open_backend(exported), ())
    ids = prompt_of(40, 5)
    stream = generator.stream(ids, GREEDY, max_new_tokens=50)
    said = list(islice(stream, taken))
    stream.close()
    if taken:
        assert generator.finish_reason == "cancelled"
        assert generator.stats is not None and generator.stats.new_tokens == taken
    following = ids + said + prompt_of(6, 6)
    expected = answer(open_backend(exported), following, 30)
    assert list(generator.stream(following, GREEDY, max_new_tokens=30)) == expected


def test_the_ends_of_an_answer(exported: SimpleNamespace) -> None:
    ids = prompt_of(10, 7)
    whole = answer(open_backend(exported), ids, 40)
    stop = next(i for i, token in enumerate(whole) if i > 3 and token not in whole[:i])

    generator = Generator(open_backend(exported), {whole[stop]})
    assert generator.finish_reason is None and generator.stats is None
    assert list(generator.stream(ids, GREEDY, max_new_tokens=40)) == whole[:stop]
    assert generator.finish_reason == "stop"
    assert generator.stats is not None and generator.stats.new_tokens == stop

    generator = Generator(open_backend(exported), ())
    assert list(generator.stream(ids, GREEDY, max_new_tokens=3)) == whole[:3]
    assert generator.finish_reason == "length"

    generator = Generator(open_backend(exported, max_len=20), ())
    # Ten more tokens fit the cache; the logits after the last of them still give one more.
    assert list(generator.stream(ids, GREEDY, max_new_tokens=40)) == whole[:11]
    assert generator.finish_reason == "full"
    assert list(generator.stream(ids, GREEDY, max_new_tokens=5)) == whole[:5]


def test_a_prompt_as_long_as_the_cache_gives_one_token_and_a_longer_one_an_error(exported: SimpleNamespace) -> None:
    generator = Generator(open_backend(exported, max_len=32), ())
    ids = prompt_of(32, 8)
    assert list(generator.stream(ids, GREEDY, max_new_tokens=9)) == answer(open_backend(exported), ids, 1)
    assert generator.finish_reason == "full"
    held = generator.cached_ids
    with pytest.raises(UserError, match="33 tokens and the context holds 32") as raised:
        generator.stream([*ids, 5], GREEDY, max_new_tokens=9)
    assert "--max-len" in raised.value.mend
    assert generator.cached_ids == held and generator.backend.lengths.tolist() == [32]
    with pytest.raises(UserError, match="no tokens"):
        generator.stream([], GREEDY, max_new_tokens=9)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        generator.stream(ids, GREEDY, max_new_tokens=0)


def test_figures_are_of_one_clock(exported: SimpleNamespace) -> None:
    generator = Generator(open_backend(exported), ())
    list(generator.stream(prompt_of(20), GREEDY, max_new_tokens=12))
    stats = generator.stats
    assert stats is not None and stats.new_tokens == 12
    assert stats.ttft_seconds > 0 and stats.tpot_seconds > 0 and stats.tokens_per_second > 0
    list(generator.stream(prompt_of(20), GREEDY, max_new_tokens=1))
    assert generator.stats is not None and generator.stats.tpot_seconds == 0 == generator.stats.tokens_per_second


class HashBackend:
    """A decoder whose next logits are a hash of the whole cache, and which fails when told, before or after it wrote.

    One wrong, missing or surplus token in the cache changes every later token, so nothing can hide.
    """

    name, vocab_size, batch_size = "hash", 50, 1

    def __init__(self, max_len: int) -> None:
        self.max_len, self.held, self.fed, self.fail_at = max_len, [], 0, -1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(self.held)])

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        return self._feed(list(rows[0]))

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._feed(tokens.tolist())

    def truncate(self, length: int) -> int:
        del self.held[length:]
        return len(self.held)

    def _feed(self, tokens: list[int]) -> NDArray[np.float32]:
        assert tokens and len(self.held) + len(tokens) <= self.max_len
        self.fed += len(tokens)
        self.fail_at -= 1
        if self.fail_at == 0:
            raise KeyboardInterrupt
        self.held += tokens
        if self.fail_at == 1:
            self.fail_at = -1
            raise KeyboardInterrupt
        rng = np.random.default_rng(zlib.crc32(bytes(self.held)))
        return rng.random((1, self.vocab_size), np.float32)


class ForgetfulBackend(HashBackend):
    """One whose state cannot go back, as that of a convolution."""

    def truncate(self, length: int) -> int:
        self.held = self.held if len(self.held) <= length else []
        return len(self.held)


def run(generator: Generator, ids: list[int], take: int) -> list[int]:
    said: list[int] = []
    stream = generator.stream(ids, GREEDY, max_new_tokens=12)
    try:
        for token in stream:
            said.append(token)
            if len(said) == take:
                break
    except KeyboardInterrupt:
        assert generator.finish_reason == "cancelled"
    stream.close()
    return said


def conversations(rng: np.random.Generator, said: list[int], ids: list[int]) -> Iterator[list[int]]:
    """The next prompts there can be: the chat goes on, an old turn is edited, or a new chat begins."""
    fresh = rng.integers(0, 50, rng.integers(1, 10)).tolist()
    yield (ids + said + fresh)[:55]
    yield (ids[: rng.integers(0, len(ids))] + fresh)[:55]
    yield fresh
    yield list(ids)


@pytest.mark.parametrize(("kind", "expected_reuse"), [(HashBackend, 5000), (ForgetfulBackend, 500)])
def test_any_prompts_with_any_interruptions_say_what_a_fresh_cache_says(
    kind: type[HashBackend], expected_reuse: int
) -> None:
    rng = np.random.default_rng()
    backend = kind(max_len=60)
    generator = Generator(backend, {7, 8})  # type: ignore[arg-type]
    ids, said, reused = [1], [], 0
    for _ in range(1500):
        ids = list(conversations(rng, said, ids))[rng.integers(4)]
        backend.fail_at = int(rng.integers(1, 12)) if rng.random() < 0.4 else -1
        fed = backend.fed
        said = run(generator, ids, take=int(rng.integers(1, 20)))
        fresh = Generator(HashBackend(max_len=60), {7, 8})  # type: ignore[arg-type]
        assert said == list(fresh.stream(ids, GREEDY, max_new_tokens=12))[: len(said)]
        held = list(generator.cached_ids)
        assert backend.held[: len(held)] == held
        if generator.stats is not None:
            reused += generator.stats.reused_tokens
            steps = generator.stats.new_tokens + 1  # each given token may be fed, and one more may have failed
            assert backend.fed - fed <= len(ids) - generator.stats.reused_tokens + steps
    assert reused > expected_reuse


def test_a_cache_that_somebody_emptied_is_not_taken_for_full() -> None:
    backend = HashBackend(max_len=60)
    generator = Generator(backend, ())  # type: ignore[arg-type]
    expected = run(generator, [1, 2, 3, 4], take=20)
    backend.truncate(2)
    assert run(generator, [1, 2, 3, 4], take=20) == expected


def test_a_model_that_gives_nan_is_an_error_and_not_a_token() -> None:
    class Broken(HashBackend):
        def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
            return super().decode(tokens) * np.float32(np.nan)

    generator = Generator(Broken(60), ())  # type: ignore[arg-type]
    with pytest.raises(OrinKitError, match="greatest logit is nan"):
        list(generator.stream([1, 2], GREEDY, max_new_tokens=5))
    assert generator.finish_reason == "cancelled"
