"""From logits to the next token.

Order and meaning are those of transformers' logits processors (transformers/generation/logits_process.py), so that a
`generation_config.json` means here what it means there: repetition penalty, then temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import OrinKitError, UserError

# option: (type, least, greatest, whether the least value itself is allowed, the range in words)
RANGES: dict[str, tuple[type, float, float, bool, str]] = {
    "temperature": (float, 0, math.inf, True, "a number of 0 (greedy) or more"),
    "top_k": (int, 0, math.inf, True, "a whole number of 0 (off) or more"),
    "top_p": (float, 0, 1, False, "a number above 0 and up to 1 (off)"),
    "min_p": (float, 0, 1, True, "a number from 0 (off) to 1"),
    "repetition_penalty": (float, 0, math.inf, False, "a number above 0 (1 is off)"),
    "seed": (int, 0, math.inf, True, "a whole number of 0 or more, or none"),
}
NUCLEUS_GUESS = 256  # the first try at how many tokens hold top_p of the mass; a sharp distribution needs a few


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token and leaves the options below it without effect.
        top_k: keep the k likeliest tokens (and those tied with the last of them); 0 keeps all.
        top_p: keep the likeliest tokens until their probabilities reach this sum; 1 keeps all.
        min_p: keep the tokens at least this many times as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of every token of the prompt and of the
            answer so far (https://arxiv.org/abs/1909.05858); also when greedy. 1 changes nothing.
        seed: of the random numbers; None takes a fresh one each time.

    Raises:
        UserError: an option is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (kind, least, greatest, closed, words) in RANGES.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            right_type = isinstance(value, (kind, int)) and not isinstance(value, bool)
            if not right_type or not math.isfinite(value) or not least <= value <= greatest:
                raise UserError(f"{name} is {value!r}", mend=f"give {words}")
            if value == least and not closed:
                raise UserError(f"{name} is {value!r}", mend=f"give {words}")


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: the options.
        history: ids of the prompt, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, history: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self._seen = np.unique(np.asarray(history, dtype=np.int64))
        self._random = np.random.default_rng(sampling.seed)

    def next(self, logits: NDArray[np.float32]) -> int:
        """Choose one token by its logits `[vocab]`, and remember it for the repetition penalty.

        Raises:
            OrinKitError: the logits hold NaN or +inf, or nothing but -inf.
        """
        if self.sampling.temperature == 0:
            token = int(np.argmax(self._penalised(logits)))
        else:
            ids, probabilities = self.distribution(logits)
            cumulative = np.cumsum(probabilities)
            place = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
            token = int(ids[min(place, len(ids) - 1)])
        if self.sampling.repetition_penalty != 1:
            self._seen = np.union1d(self._seen, [token])
        return token

    def distribution(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens that may be chosen and their probabilities (sum 1), both `[kept]`; for a temperature above 0.

        Raises:
            OrinKitError: as `next`.
        """
        options = self.sampling
        scores = self._penalised(logits)
        if 0 < options.top_k < scores.size:
            ids = np.flatnonzero(scores >= np.partition(scores, -options.top_k)[-options.top_k])
        else:
            ids = np.arange(scores.size)
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to -inf, as it should
            weights = np.exp((scores[ids].astype(np.float64) - scores.max()) / options.temperature)
        if options.top_p < 1:
            kept = _nucleus(weights, options.top_p)
            ids, weights = ids[kept], weights[kept]
        if options.min_p > 0:
            kept = np.flatnonzero(weights >= options.min_p)  # the likeliest token's weight is 1
            ids, weights = ids[kept], weights[kept]
        return ids, weights / weights.sum()

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        # argmax and max let NaN win, so one look at the greatest logit finds NaN, +inf and nothing-but--inf.
        greatest = logits.max()
        if not np.isfinite(greatest):
            raise OrinKitError(
                f"the model's greatest logit is {greatest}, so no token can be chosen",
                mend="the weights or the export are broken: evaluate the model before export, then export it again, "
                "in fp32 if fp16 overflows",
            )
        penalty = self.sampling.repetition_penalty
        if penalty == 1 or not self._seen.size:
            return logits
        scores: NDArray[np.float32] = logits.copy()
        seen = scores[self._seen]
        scores[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        return scores


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices of the likeliest tokens: those with less than `top_p` of the mass above them (always one at least).

    Sorts only as many of the greatest weights as are needed: at 151,936 tokens a whole sort is most of a step's time.
    """
    wanted = top_p * weights.sum()
    count = NUCLEUS_GUESS
    while count < weights.size:
        best = np.argpartition(weights, -count)[-count:]
        if weights[best].sum() >= wanted:
            break
        count *= 16
    else:
        best = np.arange(weights.size)
    order = best[np.argsort(-weights[best], kind="stable")]
    cumulative = np.cumsum(weights[order])
    return order[: int(np.searchsorted(cumulative, wanted, side="left")) + 1]
