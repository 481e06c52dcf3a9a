"""What the plugin operators of domain `orin_kit` compute: their contract, in numpy, as onnx.reference runs it.

`T` is fp16, or fp32 where a graph is checked. The CUDA kernels in `jetson/plugins` are written against this file.
Attributes are members of the operator, and passed once more, which `**_` takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

from orin_kit.export.interleave import deinterleave

DOMAIN = "orin_kit"

Floats = NDArray[np.floating[Any]]


class Int4Linear(OpRun):
    """`x W^T + bias` with 4-bit weights, and `silu(gate) * up` of its outputs where asked for.

    Inputs: x T `[..., in]`; weight int32, codes as `interleave.py` lays them, `w = (code - 8) * scale`; scales fp16
    `[in / group_size, out]`; bias T `[out]`, optional. Attributes: N (out), K (in), group_size 32, 64 or 128,
    activation "none" or "silu_gate": then row 2 j of the weight is gate j and row 2 j + 1 is up j, the bias likewise,
    and the output has `N / 2` features. Output T `[..., out]`. K is a multiple of 128, N of 8 (16 with "silu_gate").
    Sums are in fp32.
    """

    op_domain = DOMAIN
    activation: str

    def _run(
        self, x: Floats, weight: NDArray[np.int32], scales: Floats, bias: Floats | None = None, **_: Any
    ) -> tuple[Any]:
        w = _dense(deinterleave(weight), scales.T)
        y = x.astype(np.float32) @ w.T
        if bias is not None:
            y += bias.astype(np.float32)
        if self.activation == "silu_gate":
            gate, up = y[..., 0::2], y[..., 1::2]
            y = gate / (1 + np.exp(-gate)) * up
        return (y.astype(x.dtype),)


class KvAttention(OpRun):
    """Rotary embedding, append to the cache, causal attention of grouped query heads over it.

    Inputs: qkv T `[batch, sequence, (num_heads + 2 kv_num_heads) * head_dim]`; key_cache, value_cache T or int8
    `[batch, kv_num_heads, max_len, head_dim]`; past_lengths int32 `[batch]`; cos, sin fp32 `[max_positions, head_dim /
    2]`; with qk_norm = 1 two more, q_norm and k_norm T `[head_dim]`, RMS norms before the rotation; with int8 caches
    two more, key_scale and value_scale fp32 `[1, kv_num_heads, 1, head_dim]`. None is ever left out in between.
    Attributes: num_heads, kv_num_heads, head_dim, scale, qk_norm, norm_epsilon. Outputs: attended T `[batch, sequence,
    num_heads * head_dim]`, and the caches, which are the inputs' own memory.

    Row b's new keys and values are written at `past_lengths[b] + s`; what would lie behind the cache is not written:
    that is padding. int8 holds `clip(rint(x / scale), -128, 127)`, and attention sees what is stored, of the new
    tokens too. The halves of a head rotate: `(a, b) -> (a cos - b sin, b cos + a sin)`.
    """

    op_domain = DOMAIN
    num_heads: int
    kv_num_heads: int
    head_dim: int
    scale: float
    qk_norm: int
    norm_epsilon: float

    def _run(
        self,
        qkv: Floats,
        key_cache: NDArray[Any],
        value_cache: NDArray[Any],
        past_lengths: NDArray[np.int32],
        cos: Floats,
        sin: Floats,
        *more: Floats,
        **_: Any,
    ) -> tuple[Any, ...]:
        q_norm, k_norm = more[:2] if self.qk_norm else (None, None)
        key_scale, value_scale = more[-2:] if key_cache.dtype == np.int8 else (None, None)
        heads, kv_heads, dim = self.num_heads, self.kv_num_heads, self.head_dim
        batch, length = qkv.shape[:2]
        split = qkv.astype(np.float32).reshape(batch, length, heads + 2 * kv_heads, dim).transpose(0, 2, 1, 3)
        query, key, value = np.split(split, [heads, heads + kv_heads], axis=1)
        query, key = self._normed(query, q_norm), self._normed(key, k_norm)
        keys, values = key_cache.copy(), value_cache.copy()
        out = np.empty((batch, heads, length, dim), np.float32)
        for row, past in enumerate(past_lengths):
            places = np.arange(past, past + length)
            fits = places < keys.shape[2]
            angles = np.minimum(places, len(cos) - 1)
            fresh = _rotated(key[row], cos[angles], sin[angles])
            keys[row][:, places[fits]] = _stored(fresh, key_scale, qkv.dtype)[:, fits]
            values[row][:, places[fits]] = _stored(value[row], value_scale, qkv.dtype)[:, fits]
            k, v = _loaded(keys[row], key_scale), _loaded(values[row], value_scale)
            q = _rotated(query[row], cos[angles], sin[angles])
            q = q.astype(qkv.dtype).astype(np.float32).reshape(kv_heads, -1, length, dim)
            scores = np.einsum("kgsd,ktd->kgst", q, k) * self.scale
            scores[..., np.arange(keys.shape[2]) > places[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[row] = np.einsum("kgst,ktd->kgsd", weights, v).reshape(heads, length, dim)
        attended = out.transpose(0, 2, 1, 3).reshape(batch, length, heads * dim).astype(qkv.dtype)
        return attended, keys, values

    def _normed(self, x: Floats, weight: Floats | None) -> Floats:
        return x if weight is None else _rms_norm(x, weight, self.norm_epsilon)


class SkipRmsNorm(OpRun):
    """`sum = x + residual` and its RMS norm.

    Inputs: x T `[..., hidden]`; weight T `[hidden]`; residual T, optional. Attribute: epsilon. Outputs: normed T, and
    sum T where there is a residual. The sum is rounded to T once, and the norm computed in fp32 from what is stored.
    """

    op_domain = DOMAIN
    epsilon: float

    def _run(self, x: Floats, weight: Floats, residual: Floats | None = None, **_: Any) -> tuple[Any, ...]:
        total = x if residual is None else (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
        normed = _rms_norm(total.astype(np.float32), weight, self.epsilon).astype(x.dtype)
        return (normed,) if residual is None else (normed, total)


class EmbeddingGather(OpRun):
    """Rows of a quantized table.

    Inputs: ids int64 `[batch, sequence]`; table and scales. Attributes: bits, group_size, hidden_size, layout: "rows"
    has codes int32 `[vocab, hidden * bits / 32]`, the first of a word in its lowest bits, and scales fp16 `[vocab,
    hidden / group_size]`; "int4_linear" has an `Int4Linear`'s weight and scales, that of a tied head. Output T `[batch,
    sequence, hidden]`, the attribute output_type: 10 (fp16) or 1 (fp32), as TensorProto numbers them.
    """

    op_domain = DOMAIN
    bits: int
    layout: str
    output_type: int

    def _run(self, ids: NDArray[np.int64], table: NDArray[Any], scales: Floats, **_: Any) -> tuple[Any]:
        if self.layout == "int4_linear":
            codes, scales = deinterleave(table)[ids.ravel()], scales.T
        else:
            codes = np.ascontiguousarray(table[ids.ravel()]).view(np.uint8)
            if self.bits == 4:
                codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(codes), -1)
        rows = _dense(codes, scales[ids.ravel()], middle=1 << self.bits - 1)
        dtype = {1: np.float32, 10: np.float16}[self.output_type]
        return (rows.reshape(*ids.shape, -1).astype(dtype),)


class TRT_KVCacheUpdate(OpRun):  # noqa: N801
    """TensorRT's own operator, for `trt_native` graphs: rows `[batch, kv_heads, sequence, head_dim]` into a cache.

    Inputs: past_cache; update; write_indices int32 `[batch]`, where each row's first token goes. Output: the cache.
    https://github.com/onnx/onnx-tensorrt/blob/main/docs/TRT_custom_ops.md
    """

    op_domain = "trt"

    def _run(self, cache: NDArray[Any], update: NDArray[Any], starts: NDArray[np.int32], **_: Any) -> tuple[Any]:
        written = cache.copy()
        for row, start in enumerate(starts):
            kept = update[row][:, : max(0, cache.shape[2] - start)]
            written[row][:, start : start + kept.shape[1]] = kept
        return (written,)


OPS: tuple[type[OpRun], ...] = (Int4Linear, KvAttention, SkipRmsNorm, EmbeddingGather, TRT_KVCacheUpdate)


def _dense(codes: NDArray[np.uint8], scales: Floats, middle: int = 8) -> NDArray[np.float32]:
    """`(code - middle) * scale`, codes `[rows, in]`, scales `[rows, in / group_size]`."""
    groups = codes.reshape(*scales.shape, -1).astype(np.float32) - middle
    weight: NDArray[np.float32] = groups * scales[..., None].astype(np.float32)
    return weight.reshape(codes.shape)


def _rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    normed: Floats = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + epsilon) * weight.astype(np.float32)
    return normed


def _rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _stored(x: Floats, scale: Floats | None, dtype: Any) -> NDArray[Any]:
    """`[kv_heads, sequence, head_dim]` as the cache holds it."""
    if scale is None:
        return x.astype(dtype)
    stored: NDArray[np.int8] = np.clip(np.rint(x / scale[0]), -128, 127).astype(np.int8)
    return stored


def _loaded(cache: NDArray[Any], scale: Floats | None) -> Floats:
    loaded: Floats = cache.astype(np.float32)
    return loaded if scale is None else loaded * scale[0]
