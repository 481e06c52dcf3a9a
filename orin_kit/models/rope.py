"""Rotary position embedding: frequencies and their scaling (default, linear, llama3, yarn).

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), Llama 3.1's model card, and the field names of
`transformers.modeling_rope_utils`, which the tests compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import UnsupportedModelError

# Scaling type -> the fields it reads. Anything else in `rope_scaling` / `rope_parameters` is refused.
SCALINGS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
}  # fmt: skip
REQUIRED = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor"},
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one model.

    Attributes:
        theta: base of the frequencies.
        kind: a key of `SCALINGS`.
        scaling: the scaling's own fields, as in the config.
        max_position_embeddings: the model's context, the default for YaRN's original context.
    """

    theta: float
    kind: str = "default"
    scaling: dict[str, Any] = field(default_factory=dict)
    max_position_embeddings: int = 0

    def frequencies(self, head_dim: int) -> tuple[NDArray[np.float64], float]:
        """Inverse frequencies `[head_dim / 2]` and the factor on cos and sin (1 except for YaRN)."""
        inverse = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            return inverse / self.scaling["factor"], 1.0
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "yarn":
            return self._yarn(inverse, head_dim)
        return inverse, 1.0

    def cos_sin(self, positions: int, head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Tables `[positions, head_dim / 2]` of cos and sin, the attention factor multiplied in."""
        inverse, factor = self.frequencies(head_dim)
        # The angles are taken in fp32, as transformers takes them, so that far positions agree with it.
        angles = np.arange(positions, dtype=np.float32)[:, None] * inverse.astype(np.float32)[None, :]
        return (np.cos(angles) * np.float32(factor)), (np.sin(angles) * np.float32(factor))

    def _llama3(self, inverse: NDArray[np.float64]) -> NDArray[np.float64]:
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        turns = self.scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast frequencies, kept; 0: slow ones, stretched
        return np.asarray(share * inverse + (1 - share) * inverse / self.scaling["factor"])

    def _yarn(self, inverse: NDArray[np.float64], head_dim: int) -> tuple[NDArray[np.float64], float]:
        scaling = self.scaling
        factor = scaling["factor"]
        original = scaling.get("original_max_position_embeddings") or self.max_position_embeddings

        def dimension(turns: float) -> float:
            """The (fractional) frequency index that makes `turns` turns over the original context."""
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0, 1)
        frequencies = inverse / factor * ramp + inverse * (1 - ramp)
        return frequencies, self._yarn_attention_factor(factor)

    def _yarn_attention_factor(self, factor: float) -> float:
        given = self.scaling.get("attention_factor")
        if given is not None:
            return float(given)

        def scale(mscale: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

        mscale, all_dim = self.scaling.get("mscale"), self.scaling.get("mscale_all_dim")
        return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def read_rope(config: dict[str, Any], source: str) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).

    Raises:
        UnsupportedModelError: a scaling type or field that is not in `SCALINGS`, or a required field missing.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UnsupportedModelError(f"{source}: rope scaling is {given!r}", mend="it must be a JSON object")
    fields = {k: v for k, v in given.items() if k not in ("rope_type", "type", "rope_theta")}
    if fields.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedModelError(f"{source}: partial_rotary_factor is not supported", mend="use another model")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in SCALINGS:
        known = ", ".join(SCALINGS)
        raise UnsupportedModelError(f"{source}: rope scaling {kind!r} is not supported", mend=f"known: {known}")
    if kind == "default":
        fields = {k: v for k, v in fields.items() if k not in ("factor", "original_max_position_embeddings")}
    if unknown := set(fields) - SCALINGS[kind]:
        what = f"{source}: rope scaling {kind!r} has the unknown field {min(unknown)!r}"
        raise UnsupportedModelError(what, mend="use a model without it, or ask for it in an issue")
    if missing := REQUIRED.get(kind, set()) - set(fields):
        what = f"{source}: rope scaling {kind!r} lacks {min(missing)!r}"
        raise UnsupportedModelError(what, mend="restore the model's own config.json")
    theta = given.get("rope_theta") or config.get("rope_theta") or 10000.0
    return Rope(float(theta), kind, fields, int(config.get("max_position_embeddings") or 0))
