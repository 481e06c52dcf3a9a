"""Group-wise symmetric quantization of weights, and the one packing of INT4 that every format is made from.

A weight `[out, in]` is cut into groups of `group_size` input features; a group shares one positive fp16 scale and no
zero point: `weight = q * scale`, q in [-8, 7]. TensorRT's block dequantization, onnxruntime's MatMulNBits and
compressed-tensors all read this.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import UserError

GROUP_SIZES = (32, 64, 128, 256)
# Shares of the scale that just holds a group's largest weight: clipping one outlier makes all other steps finer. Mean
# squared error on Gaussian weights, group 128: max/7 13.8e-3, max/8 11.2e-3, these six 10.3e-3, 41 of them 10.2e-3.
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
    gram: NDArray[np.float32] | None = None,
    search: bool = True,
    name: str = "weight",
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Quantize a weight, each group with the scale that loses least.

    Args:
        weight: `[out, in]`, any float dtype; read a chunk of rows at a time.
        group_size: divides `in`.
        bits: 4 or 8.
        gram: fp32 `[in / group_size, group_size, group_size]`, `X_g^T X_g` of the inputs X_g that meet each group. The
            scale then loses least of the group's *output* (the clip search of AWQ, arXiv 2306.00978), else of the
            weights themselves.
        search: try all `SHARES`; off takes the scale that clips nothing.
        name: of the layer, for errors.

    Returns:
        q int8 `[out, in]` in [-8, 7] (or [-128, 127]), scales fp16 `[out, in / group_size]`, all positive.

    Raises:
        UserError: a NaN or an infinity, weights beyond the scales' range, or groups that do not fit.
    """
    rows, columns = weight.shape
    check_group_size(name, columns, group_size)
    q = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // group_size), np.float16)
    shares = SHARES if search and bits == 4 else SHARES[:1]

    def work(part: slice) -> None:
        groups = np.asarray(weight[part], np.float32).reshape(-1, columns // group_size, group_size)
        base = _widest_scale(groups, bits, name)
        scale = base if len(shares) == 1 else _best_scale(groups, base, shares, bits, gram)
        q[part] = _round(groups, scale, bits).reshape(-1, columns)
        scales[part] = scale

    step = max(1, CHUNK // columns)
    with ThreadPoolExecutor(THREADS) as pool:  # numpy lets go of the interpreter in each operation
        list(pool.map(work, [slice(start, start + step) for start in range(0, rows, step)]))
    return q, scales


def dequantize(q: NDArray[np.int8], scales: NDArray[np.generic], group_size: int) -> NDArray[np.float32]:
    """`q * scale` in fp32: q int8 `[out, in]`, scales `[out, in / group_size]`."""
    groups = q.reshape(q.shape[0], -1, group_size) * np.asarray(scales, np.float32)[..., None]
    return groups.reshape(q.shape)


def pack(q: NDArray[np.int8]) -> NDArray[np.int32]:
    """Pack q int8 `[out, in]` in [-8, 7] into int32 `[out, in / 8]`, as compressed-tensors' `weight_packed`.

    Eight neighbours share a word, the first in the lowest four bits, each stored as q + 8. Little-endian hosts only.
    """
    nibbles = (q + np.int8(8)).view(np.uint8)
    packed: NDArray[np.int32] = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(np.int32)
    return packed


def unpack(packed: NDArray[np.int32]) -> NDArray[np.int8]:
    """`pack` undone: int32 `[out, in / 8]` -> int8 `[out, in]`."""
    pairs = np.ascontiguousarray(packed).view(np.uint8)
    nibbles = np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(pairs.shape[0], -1)
    q: NDArray[np.int8] = nibbles.view(np.int8) - np.int8(8)
    return q


def matmulnbits_blob(packed: NDArray[np.int32], group_size: int) -> NDArray[np.uint8]:
    """Input B of onnxruntime's MatMulNBits: the same bytes, seen as uint8 `[out, in / group_size, group_size / 2]`.

    Its default zero point is 8, so none is passed.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
    """
    return np.ascontiguousarray(packed).view(np.uint8).reshape(packed.shape[0], -1, group_size // 2)


def _widest_scale(groups: NDArray[np.float32], bits: int, name: str) -> NDArray[np.float32]:
    """The scales `[rows, groups]` that clip nothing, as fp16 holds them."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    # Negative weights have one more step; NaN goes through max and min.
    scale = np.maximum(groups.max(-1) / high, groups.min(-1) / low)
    if not np.isfinite(scale).all():
        raise UserError(f"{name} holds NaN or infinite weights", mend="get the checkpoint again or train it again")
    if scale.max() > np.finfo(np.float16).max:
        what = f"{name} has a weight of {np.abs(groups).max():.3g}, beyond what fp16 scales can hold"
        raise UserError(what, mend="this checkpoint cannot be quantized")
    return _as_fp16(scale)


def _best_scale(
    groups: NDArray[np.float32],
    base: NDArray[np.float32],
    shares: tuple[float, ...],
    bits: int,
    gram: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    best, least = base, np.full(base.shape, np.inf, np.float32)
    for share in shares:
        scale = _as_fp16(base * np.float32(share))
        lost = _round(groups, scale, bits)
        lost *= scale[..., None]
        lost -= groups
        error = _squared(lost, gram)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


def _squared(lost: NDArray[np.float32], gram: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The squared error `[rows, groups]` that lost weights `[rows, groups, group_size]` make in the outputs."""
    seen = lost if gram is None else np.matmul(lost.transpose(1, 0, 2), gram).transpose(1, 0, 2)
    error: NDArray[np.float32] = np.einsum("rgi,rgi->rg", seen, lost)
    return error


def _round(groups: NDArray[np.float32], scale: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    q: NDArray[np.float32] = groups * (np.float32(1) / scale)[..., None]
    np.rint(q, out=q)
    np.clip(q, -(1 << bits - 1), (1 << bits - 1) - 1, out=q)
    return q


def _as_fp16(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales as they will be stored; a group of zeros gets the smallest positive one."""
    stored: NDArray[np.float32] = scale.astype(np.float16).astype(np.float32)
    np.maximum(stored, np.float32(SMALLEST_SCALE), out=stored)
    return stored
