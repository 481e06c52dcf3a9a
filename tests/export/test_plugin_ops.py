"""The plugin operators against their definitions in plain loops and float64, and the layout against the contract's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from orin_kit.export.interleave import deinterleave, interleave
from orin_kit.export.plugin_ops import OPS
from orin_kit.models.packing import PackedWeight, pack

RNG = np.random.default_rng()


def run(op: str, inputs: list[NDArray[Any]], outputs: int = 1, **attributes: Any) -> list[NDArray[Any]]:
    """One node, by onnx.reference."""
    names = [f"in{i}" for i in range(len(inputs))]
    made = [f"out{i}" for i in range(outputs)]
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), None)
        for name, x in zip(names, inputs, strict=True)
    ]
    node = helper.make_node(op, names, made, domain="orin_kit", plugin_version="1", **attributes)
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made]
    graph = helper.make_graph([node], "one", values, results)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("orin_kit", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    return ReferenceEvaluator(model, new_ops=list(OPS)).run(None, dict(zip(names, inputs, strict=True)))


def random_weight(rows: int, columns: int, group_size: int) -> tuple[PackedWeight, NDArray[np.float64]]:
    codes = RNG.integers(0, 16, (rows, columns), dtype=np.uint8)
    scales = RNG.uniform(0.01, 0.1, (rows, columns // group_size)).astype(np.float16)
    dense = (codes.astype(np.float64) - 8) * scales.astype(np.float64).repeat(group_size, axis=1)
    return PackedWeight(4, pack(codes), scales), dense


def test_each_nibble_lies_where_the_contract_says() -> None:
    weight, _ = random_weight(24, 384, 128)
    codes, words = weight.codes(), interleave(weight).view(np.uint32)
    assert words.shape == (3, 3, 8, 4, 4)
    for n, k in zip(RNG.integers(0, 24, 200), RNG.integers(0, 384, 200), strict=True):
        block, within = divmod(int(k), 128)
        step, place = divmod(within, 16)
        half, place = divmod(place, 8)
        thread, neighbour = divmod(place, 2)
        word = words[n // 8, block, n % 8, thread, step // 2]
        pair = 2 * (step % 2) + half
        assert (word >> (4 * pair + 16 * neighbour)) & 15 == codes[n, k]
    np.testing.assert_array_equal(deinterleave(words.view(np.int32)), codes)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_linear(group_size: int) -> None:
    weight, dense = random_weight(48, 256, group_size)
    x, bias = RNG.standard_normal((2, 5, 256)).astype(np.float32), RNG.standard_normal(48).astype(np.float32)
    sizes = dict(N=48, K=256, group_size=group_size)
    scales = np.ascontiguousarray(weight.scales.T)
    expected = x.astype(np.float64) @ dense.T + bias
    (plain,) = run("Int4Linear", [x, interleave(weight), scales, bias], activation="none", **sizes)
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-4)
    (gated,) = run("Int4Linear", [x, interleave(weight), scales, bias], activation="silu_gate", **sizes)
    gate, up = expected[..., 0::2], expected[..., 1::2]
    np.testing.assert_allclose(gated, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 128), (12, 2, 128)])
def test_kv_attention(heads: int, kv_heads: int, dim: int, int8: bool) -> None:
    batch, length, max_len, past = 2, 3, 12, np.array([5, 0], np.int32)
    qkv = RNG.standard_normal((batch, length, (heads + 2 * kv_heads) * dim)).astype(np.float32)
    angles = RNG.uniform(0, 6, (max_len, dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    norms = [RNG.uniform(0.5, 1.5, dim).astype(np.float32) for _ in range(2)]
    scales = [RNG.uniform(0.02, 0.05, (1, kv_heads, 1, dim)).astype(np.float32) for _ in range(2)] if int8 else []
    draw = (
        (lambda s: RNG.integers(-99, 99, s).astype(np.int8)) if int8 else (lambda s: RNG.standard_normal(s, np.float32))
    )
    caches = [draw((batch, kv_heads, max_len, dim)) for _ in range(2)]
    how = dict(num_heads=heads, kv_num_heads=kv_heads, head_dim=dim, scale=dim**-0.5, norm_epsilon=1e-6, qk_norm=1)
    out, keys, values = run("KvAttention", [qkv, *caches, past, cos, sin, *norms, *scales], 3, **how)

    def normed(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
        return x / np.sqrt((x.astype(np.float64) ** 2).mean() + 1e-6) * weight

    def rotated(x: NDArray[Any], at: int) -> NDArray[np.float64]:
        a, b = x[: dim // 2], x[dim // 2 :]
        return np.concatenate((a * cos[at] - b * sin[at], b * cos[at] + a * sin[at]))

    def cached(x: NDArray[Any], which: int, head: int) -> NDArray[np.float64]:
        return np.clip(np.rint(x / scales[which][0, head, 0]), -128, 127) if int8 else x

    def seen(cache: NDArray[Any], which: int, head: int) -> NDArray[np.float64]:
        return cache.astype(np.float64) * (scales[which][0, head, 0] if int8 else 1)

    per_head = qkv.reshape(batch, length, heads + 2 * kv_heads, dim)
    for row in range(batch):
        for s in range(length):
            at = int(past[row]) + s
            for head in range(kv_heads):
                k = rotated(normed(per_head[row, s, heads + head], norms[1]), at)
                np.testing.assert_allclose(keys[row, head, at], cached(k, 0, head), atol=1.01 if int8 else 1e-5)
                v = cached(per_head[row, s, heads + kv_heads + head], 1, head)
                np.testing.assert_allclose(values[row, head, at], v, atol=1.01 if int8 else 1e-6)
            for head in range(heads):
                owner = head // (heads // kv_heads)
                q = rotated(normed(per_head[row, s, head], norms[0]), at)
                k, v = seen(keys[row, owner, : at + 1], 0, owner), seen(values[row, owner, : at + 1], 1, owner)
                weights = np.exp(k @ q * dim**-0.5 - (k @ q * dim**-0.5).max())
                attended = weights @ v / weights.sum()
                np.testing.assert_allclose(out[row, s, head * dim : (head + 1) * dim], attended, atol=1e-4)
        untouched = np.r_[0 : past[row], past[row] + length : max_len]
        np.testing.assert_array_equal(keys[row][:, untouched], caches[0][row][:, untouched])


def test_padding_behind_the_cache_is_not_written() -> None:
    cache = RNG.standard_normal((2, 1, 8, 64)).astype(np.float32)
    qkv = RNG.standard_normal((2, 4, 3 * 64)).astype(np.float32)
    tables = [np.ones((8, 32), np.float32), np.zeros((8, 32), np.float32)]
    how = dict(num_heads=1, kv_num_heads=1, head_dim=64, scale=0.125, norm_epsilon=1e-6, qk_norm=0)
    _, keys, _ = run("KvAttention", [qkv, cache, cache, np.array([6, 0], np.int32), *tables], 3, **how)
    np.testing.assert_array_equal(keys[0, 0, 6:], qkv[0, :2, 64:128])
    np.testing.assert_array_equal(keys[0, 0, :6], cache[0, 0, :6])


def test_skip_rms_norm() -> None:
    x, residual = (RNG.standard_normal((2, 3, 96)).astype(np.float16) for _ in range(2))
    weight = RNG.uniform(0.5, 2, 96).astype(np.float16)
    normed, total = run("SkipRmsNorm", [x, weight, residual], 2, epsilon=1e-5)
    np.testing.assert_array_equal(total, x + residual)
    wide = (x + residual).astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(normed, expected, rtol=2e-3)
    (alone,) = run("SkipRmsNorm", [x + residual, weight], 1, epsilon=1e-5)
    np.testing.assert_array_equal(alone, normed)


@pytest.mark.parametrize("layout", ["int4_linear", "rows-4", "rows-8"])
def test_embedding_gather(layout: str) -> None:
    ids = RNG.integers(0, 48, (2, 5))
    if layout == "int4_linear":
        weight, dense = random_weight(48, 128, 64)
        table, scales, bits = interleave(weight), np.ascontiguousarray(weight.scales.T), 4
    else:
        bits = int(layout[-1])
        codes = RNG.integers(0, 1 << bits, (48, 128), dtype=np.uint8)
        scales = RNG.uniform(0.01, 0.1, (48, 2)).astype(np.float16)
        dense = (codes.astype(np.float64) - (1 << bits - 1)) * scales.astype(np.float64).repeat(64, axis=1)
        table = pack(codes, bits)
    how = dict(bits=bits, group_size=64, hidden_size=128, layout=layout.partition("-")[0])
    (rows,) = run("EmbeddingGather", [ids, table, scales], output_type=int(onnx.TensorProto.FLOAT), **how)
    np.testing.assert_allclose(rows, dense[ids], rtol=1e-6)
