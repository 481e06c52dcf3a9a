"""The sampler against transformers' own logits processors, on fresh random logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation import logits_process as reference

from orin_kit.errors import OrinKitError, UserError
from orin_kit.runtime.sampler import Sampler, Sampling

CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=1),
    Sampling(temperature=0.7, top_k=40),
    Sampling(temperature=1.3, top_p=0.9),
    Sampling(temperature=0.3, top_p=0.5),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.5, top_p=0.999),
    Sampling(temperature=0.8, min_p=0.05),
    Sampling(temperature=0.8, min_p=1.0),
    Sampling(temperature=0.9, repetition_penalty=1.3),
    Sampling(temperature=0.9, repetition_penalty=0.7),
    Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
    Sampling(temperature=2.0, top_k=10**6, top_p=0.95, min_p=0.001, repetition_penalty=2.0),
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def random_logits(rng: np.random.Generator, vocab: int) -> NDArray[np.float32]:
    logits = (rng.standard_normal(vocab) * rng.uniform(0.5, 6)).astype(np.float32)
    logits[rng.integers(0, vocab, vocab // 50)] = -np.inf  # tokens that a constraint has ruled out
    return logits


def transformers_scores(logits: NDArray[np.float32], sampling: Sampling, history: list[int]) -> torch.Tensor:
    processors = [
        reference.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        reference.TemperatureLogitsWarper(sampling.temperature) if sampling.temperature else None,
        reference.TopKLogitsWarper(sampling.top_k) if sampling.top_k else None,
        reference.TopPLogitsWarper(sampling.top_p),
        reference.MinPLogitsWarper(sampling.min_p),
    ]
    scores = torch.from_numpy(logits.copy()).double()[None]
    for processor in processors:
        if processor is not None:
            scores = processor(torch.tensor([history]), scores)
    return scores[0]


@pytest.mark.parametrize("sampling", CASES, ids=str)
@pytest.mark.parametrize("vocab", [512, 33_000])
def test_the_filtered_distribution_is_that_of_transformers(
    sampling: Sampling, vocab: int, rng: np.random.Generator
) -> None:
    for _ in range(2):
        logits, history = random_logits(rng, vocab), rng.integers(0, vocab, 100).tolist()
        ids, probabilities = Sampler(sampling, history).distribution(logits)
        ours = np.zeros(vocab)
        ours[ids] = probabilities
        expected = torch.softmax(transformers_scores(logits, sampling, history), -1).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)
        assert np.array_equal(np.flatnonzero(ours), np.flatnonzero(expected))


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_the_filtered_distribution_at_a_real_vocabulary(sampling: Sampling, rng: np.random.Generator) -> None:
    vocab = 151_936
    logits, history = random_logits(rng, vocab), rng.integers(0, vocab, 2000).tolist()
    ids, probabilities = Sampler(sampling, history).distribution(logits)
    expected = torch.softmax(transformers_scores(logits, sampling, history), -1).numpy()
    # Which side of the edge of top_p a token falls on may differ by one rounding among 151,936 summands.
    assert abs(np.count_nonzero(probabilities) - np.count_nonzero(expected)) <= 2
    np.testing.assert_allclose(probabilities, expected[ids], rtol=1e-3, atol=1e-7)


def test_own_tokens_join_the_history(rng: np.random.Generator) -> None:
    """Greedy with a repetition penalty, step by step against the reference that is given the grown history."""
    sampling, history = Sampling(repetition_penalty=1.8), [3, 1, 3]
    sampler = Sampler(sampling, history)
    # The same every step, so that only the penalty can change the choice; 1.5 / 1.8 is less than any other logit.
    logits = rng.uniform(1, 1.5, 64).astype(np.float32)
    chosen = []
    for _ in range(20):
        expected = int(transformers_scores(logits, sampling, history).argmax())
        chosen.append(sampler.next(logits))
        assert chosen[-1] == expected
        history = [*history, expected]
    assert len(set(chosen)) == 20 and not {1, 3} & set(chosen)


def test_greedy_is_argmax_and_leaves_the_logits_alone(rng: np.random.Generator) -> None:
    logits = random_logits(rng, 1000)
    before = logits.copy()
    for sampling in (Sampling(), Sampling(top_k=3, top_p=0.2), Sampling(temperature=1e-300), Sampling(1.0, top_k=1)):
        assert Sampler(sampling).next(logits) == int(logits.argmax())
    Sampler(Sampling(0.5, repetition_penalty=1.5), list(range(1000))).next(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, seed=7),
        Sampling(temperature=1.1, top_k=20, top_p=0.9, min_p=0.01, seed=7),
        Sampling(temperature=1.0, top_p=0.8, seed=7),
    ],
    ids=str,
)
def test_samples_follow_the_distribution(sampling: Sampling) -> None:
    """Pearson's chi-square of 20,000 draws; with seeds fixed the figure is always the same."""
    logits = np.random.default_rng(5).normal(scale=1.5, size=100).astype(np.float32)
    expected = torch.softmax(transformers_scores(logits, sampling, [0]), -1).numpy()
    draws, sampler = 20_000, Sampler(sampling)
    counts = np.bincount([sampler.next(logits) for _ in range(draws)], minlength=100)
    assert counts[expected == 0].sum() == 0
    common = expected * draws >= 5  # the test's usual condition; the rare rest is one class
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * draws
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    assert len(wanted) >= 15
    chi_square, freedom = ((seen - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # mean plus four standard deviations


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = np.zeros(50_000, np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.next(logits) for _ in range(8)]

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)
    assert draw(None) != draw(None)


def test_ties_at_the_edge_of_top_k_all_stay() -> None:
    logits = np.array([1, 5, 3, 3, 3, 0], np.float32)
    ids, probabilities = Sampler(Sampling(temperature=1.0, top_k=2)).distribution(logits)
    assert ids.tolist() == [1, 2, 3, 4]
    scores = transformers_scores(logits, Sampling(temperature=1.0, top_k=2), [])
    np.testing.assert_allclose(probabilities, torch.softmax(scores, -1).numpy()[ids], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_are_an_error_with_a_mend(bad: float, temperature: float) -> None:
    logits = np.full(10, bad if bad == -np.inf else 1.0, np.float32)
    logits[4] = bad
    with pytest.raises(OrinKitError, match="logit") as raised:
        Sampler(Sampling(temperature=temperature)).next(logits)
    assert "export it again" in raised.value.mend


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("seed", -3),
        ("seed", 1.5),
    ],
)
def test_an_option_out_of_range_is_named_with_its_range(option: str, value: object) -> None:
    with pytest.raises(UserError, match=option) as raised:
        Sampling(**{option: value})  # type: ignore[arg-type]
    assert raised.value.mend.startswith("give a ")
