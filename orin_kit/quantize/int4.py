"""Group-wise quantization of weights to 4 or 8 bits.

A weight `[out, in]` is cut into groups of `group_size` input features; a group shares one positive fp16 scale:
`weight = (code - zero_point) * scale`. Symmetric groups have the middle code for a zero point, which TensorRT's block
dequantization, onnxruntime's MatMulNBits and compressed-tensors all read; asymmetric ones each their own.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import UserError
from orin_kit.models.packing import PackedWeight, middle, pack

GROUP_SIZES = (32, 64, 128, 256)
# Shares of the scale that just holds a group's largest weight: clipping one outlier makes all other steps finer. Mean
# squared error on Gaussian weights, group 128: max/7 13.8e-3, max/8 11.2e-3, these six 10.3e-3, 41 of them 10.2e-3.
# With 8 bits the steps are so fine that what is clipped always costs more.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
CHUNK = 1 << 17  # weights worked on at a time: a few arrays of 0.5 MB, so that the search stays in the cache
THREADS = min(8, os.cpu_count() or 1)
SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)


def check_group_size(name: str, in_features: int, group_size: int, *, common: int = 0) -> None:
    """Say that a layer cannot be cut into groups.

    Args:
        name: of the layer.
        in_features: of the layer.
        group_size: wanted.
        common: what the size in the mend has to divide; 0 means `in_features` alone.

    Raises:
        UserError: `group_size` is none of `GROUP_SIZES`, or does not divide `in_features`.
    """
    if group_size not in GROUP_SIZES:
        raise UserError(f"group size {group_size} is not known", mend=f"use one of {', '.join(map(str, GROUP_SIZES))}")
    if in_features % group_size:
        fitting = [size for size in GROUP_SIZES if (common or in_features) % size == 0]
        what = f"{name} has {in_features} input features, which groups of {group_size} do not divide"
        raise UserError(what, mend=f"use --group-size {max(fitting)}" if fitting else "this model cannot be quantized")


def quantize_groups(
    weight: NDArray[np.generic],
    group_size: int,
    *,
    bits: int = 4,
    symmetric: bool = True,
    gram: NDArray[np.float32] | None = None,
    search: bool = True,
    name: str = "weight",
) -> PackedWeight:
    """Quantize a weight, each group with the scale that loses least.

    Args:
        weight: `[out, in]`, any float dtype; read a chunk of rows at a time.
        group_size: divides `in`.
        bits: 4 or 8.
        symmetric: all zero points are the middle code; else each group's codes span its own range.
        gram: fp32 `[in / group_size, group_size, group_size]`, `X_g^T X_g` of the inputs X_g that meet each group. The
            scale then loses least of the group's *output* (the clip search of AWQ, arXiv 2306.00978), else of the
            weights themselves.
        search: try all `SHARES` of the range; off clips nothing.
        name: of the layer, for errors.

    Raises:
        UserError: a NaN or an infinity, weights beyond the scales' range, or groups that do not fit.
    """
    rows, columns = weight.shape
    check_group_size(name, columns, group_size)
    packed = np.empty((rows, columns * bits // 32), np.int32)
    scales = np.empty((rows, columns // group_size), np.float16)
    zero_points = None if symmetric else np.empty(scales.shape, np.uint8)
    shares = SHARES if search and bits == 4 else SHARES[:1]

    def work(part: slice) -> None:
        groups = np.asarray(weight[part], np.float32).reshape(-1, columns // group_size, group_size)
        ranges = Ranges.of(groups, bits, name, symmetric=symmetric)
        scale, zero = _best(groups, ranges, shares, gram)
        codes = _round(groups * _inverse(scale), zero, bits)
        codes += zero[..., None] if isinstance(zero, np.ndarray) else zero
        packed[part] = pack(codes.astype(np.uint8).reshape(-1, columns), bits)
        scales[part] = scale
        if zero_points is not None:
            zero_points[part] = zero

    step = max(1, CHUNK // columns)
    with ThreadPoolExecutor(THREADS) as pool:  # numpy lets go of the interpreter in each operation
        list(pool.map(work, [slice(start, start + step) for start in range(0, rows, step)]))
    return PackedWeight(bits, packed, scales, zero_points)


@dataclass(frozen=True)
class Ranges:
    """What the codes of each group span.

    Attributes:
        bits: 4 or 8.
        widest: the scales fp32 `[rows, groups]` that clip nothing.
        low: the groups' least weights `[rows, groups]`, at most 0; None for symmetric codes.
    """

    bits: int
    widest: NDArray[np.float32]
    low: NDArray[np.float32] | None

    @classmethod
    def of(cls, groups: NDArray[np.float32], bits: int, name: str, *, symmetric: bool) -> Ranges:
        """Of weights `[rows, groups, group_size]`.

        Raises:
            UserError: a NaN or an infinity, or beyond what fp16 scales hold.
        """
        low, high = groups.min(-1), groups.max(-1)  # NaN goes through both
        if symmetric:  # negative weights have one more step
            scale = np.maximum(high / (middle(bits) - 1), low / -middle(bits))
        else:
            low = np.minimum(low, 0)
            scale = (np.maximum(high, 0) - low) / ((1 << bits) - 1)
        if not np.isfinite(scale).all():
            raise UserError(f"{name} holds NaN or infinite weights", mend="get the checkpoint again or train it again")
        if scale.max() > np.finfo(np.float16).max:
            what = f"{name} has a weight of {np.abs(groups).max():.3g}, beyond what fp16 scales can hold"
            raise UserError(what, mend="this checkpoint cannot be quantized")
        return cls(bits, scale, None if symmetric else low)

    def share(self, share: float) -> tuple[NDArray[np.float32], NDArray[np.float32] | int]:
        """Scales, as fp16 holds them, and zero points for this share of the ranges."""
        scale = _as_fp16(self.widest * np.float32(share))
        if self.low is None:
            return scale, middle(self.bits)
        zero = np.rint(self.low * np.float32(-share) / scale)
        return scale, np.clip(zero, 0, (1 << self.bits) - 1)


def _best(
    groups: NDArray[np.float32], ranges: Ranges, shares: tuple[float, ...], gram: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | int]:
    """Scales and zero points `[rows, groups]` with which the groups lose least."""
    best, best_zero = ranges.share(shares[0])
    if len(shares) == 1:
        return best, best_zero
    least = np.full(best.shape, np.inf, np.float32)
    for share in shares:
        scale, zero = ranges.share(share)
        steps = groups * _inverse(scale)
        lost = _round(steps, zero, ranges.bits)
        lost -= steps
        error = np.square(scale) * _squared(lost, gram)
        better = error < least
        best = np.where(better, scale, best)
        if not isinstance(zero, int):
            best_zero = np.where(better, zero, best_zero)
        least = np.minimum(error, least)
    return best, best_zero


def _squared(lost: NDArray[np.float32], gram: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The squared error `[rows, groups]` that lost weights `[rows, groups, group_size]` make in the outputs."""
    seen = lost if gram is None else np.matmul(lost.transpose(1, 0, 2), gram).transpose(1, 0, 2)
    error: NDArray[np.float32] = np.einsum("rgi,rgi->rg", seen, lost)
    return error


def _round(steps: NDArray[np.float32], zero: NDArray[np.float32] | int, bits: int) -> NDArray[np.float32]:
    """Weights in units of their scale, `[rows, groups, group_size]`, to whole ones that there are codes for."""
    top, whole = (1 << bits) - 1, np.rint(steps)
    if isinstance(zero, int):
        np.clip(whole, -zero, top - zero, out=whole)
    else:  # bounds that differ by group are slow
        whole += zero[..., None]
        np.clip(whole, 0, top, out=whole)
        whole -= zero[..., None]
    rounded: NDArray[np.float32] = whole
    return rounded


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    inverse: NDArray[np.float32] = (np.float32(1) / scale)[..., None]
    return inverse


def _as_fp16(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales as they will be stored; a group of zeros gets the smallest positive one."""
    stored: NDArray[np.float32] = scale.astype(np.float16).astype(np.float32)
    np.maximum(stored, np.float32(SMALLEST_SCALE), out=stored)
    return stored
