"""orin_kv_attention against the operator's definition in numpy, and against attention written out in float64."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from kernels import Buffer, KernelError, Kernels, KvAttentionArgs
from orin_kit.export.plugin_ops import DOMAIN, KvAttention

Array = NDArray[Any]
EPSILON = 1e-6


@dataclass(frozen=True)
class Case:
    """Shapes of a call. `past` says how many tokens each sequence has before it."""

    heads: int
    kv_heads: int
    dim: int
    past: tuple[int, ...]
    tokens: int = 1
    max_len: int = 200
    int8: bool = False
    qk_norm: bool = False
    positions: int = 400

    @property
    def cache(self) -> tuple[int, ...]:
        return len(self.past), self.kv_heads, self.max_len, self.dim


QWEN_1_5B = Case(heads=12, kv_heads=2, dim=128, past=(130,))
QWEN_0_5B = Case(heads=14, kv_heads=2, dim=64, past=(130,))
LLAMA_8B = Case(heads=32, kv_heads=8, dim=128, past=(70,), max_len=100)
SMALL = Case(heads=6, kv_heads=2, dim=64, past=(0, 62, 63, 64, 150))


def inputs_of(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    """By the names of orin_kv_attention_args. Behind the past the caches hold bytes 0xff: NaN in fp16."""
    width = (case.heads + 2 * case.kv_heads) * case.dim
    qkv = rng.standard_normal((len(case.past), case.tokens, width)) * rng.uniform(0.5, 3, width)
    angles = np.outer(np.arange(case.positions), 1e4 ** -np.linspace(0, 1, case.dim // 2, endpoint=False))
    made: dict[str, Array] = {
        "qkv": qkv.astype(np.float16),
        "past_lengths": np.array(case.past, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    for name in ("key_cache", "value_cache"):
        if case.int8:
            held = rng.integers(-128, 128, case.cache, dtype=np.int8)
        else:
            held = rng.standard_normal(case.cache).astype(np.float16)
        for row, past in enumerate(case.past):
            held[row, :, past:].view(np.uint8)[:] = 0xFF
        made[name] = held
    if case.qk_norm:
        made |= {name: rng.uniform(0.5, 2, case.dim).astype(np.float16) for name in ("q_norm", "k_norm")}
    if case.int8:
        # Some channels are a hundred times larger than others, as keys' are.
        shape = (case.kv_heads, case.dim)
        made |= {name: (10 ** rng.uniform(-3, -1, shape)).astype(np.float32) for name in ("key_scale", "value_scale")}
    return made


def run(kernels: Kernels, case: Case, given: dict[str, Array], **changed: Any) -> tuple[Array, Array, Array]:
    """Output and caches. The workspace is as large as asked for, and starts as NaN."""
    buffers: dict[str, Buffer] = {name: kernels.put(array) for name, array in given.items()}
    y = kernels.empty((len(case.past), case.tokens, case.heads * case.dim), np.float16)
    sizes = {
        "batch": len(case.past), "tokens": case.tokens, "num_heads": case.heads, "kv_num_heads": case.kv_heads,
        "head_dim": case.dim, "max_len": case.max_len, "max_positions": case.positions, "int8_cache": int(case.int8),
        "scale": case.dim**-0.5, "norm_epsilon": EPSILON,
    }  # fmt: skip
    args = KvAttentionArgs(
        **{**sizes, **{name: buffer.address for name, buffer in buffers.items()}, "y": y.address, **changed}
    )
    shape = len(case.past), case.tokens, case.heads, case.kv_heads, case.dim, case.max_len
    workspace = kernels.workspace("orin_kv_attention_workspace", *shape)
    read_only = [buffer for name, buffer in buffers.items() if "cache" not in name]
    kernels.call("orin_kv_attention", ctypes.byref(args), workspace, workspace.given.size, inputs=read_only)
    workspace.read()
    return y.read(), buffers["key_cache"].read(), buffers["value_cache"].read()


def operator(case: Case, given: dict[str, Array]) -> tuple[Array, Array, Array]:
    """What the contract in numpy says, NaN behind the past taken out: it multiplies that by zero."""
    names = ["qkv", "key_cache", "value_cache", "past_lengths", "cos", "sin"]
    names += ["q_norm", "k_norm"] if case.qk_norm else []
    feeds = {name: given[name].copy() for name in names}
    for row, past in enumerate(case.past):
        feeds["key_cache"][row, :, past:] = feeds["value_cache"][row, :, past:] = 0
    if case.int8:
        feeds |= {name: given[name][None, :, None] for name in ("key_scale", "value_scale")}
    node = helper.make_node(
        "KvAttention", list(feeds), ["y", "keys", "values"], domain=DOMAIN, num_heads=case.heads,
        kv_num_heads=case.kv_heads, head_dim=case.dim, scale=case.dim**-0.5, qk_norm=int(case.qk_norm),
        norm_epsilon=EPSILON,
    )  # fmt: skip

    def info(name: str, array: Array | None = None) -> onnx.ValueInfoProto:
        kind = onnx.TensorProto.FLOAT16 if array is None else helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, None)

    outputs = [info(name) for name in node.output]
    graph = helper.make_graph([node], "one", [info(*item) for item in feeds.items()], outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets), new_ops=[KvAttention])
    y, keys, values = map(np.asarray, evaluator.run(None, feeds))
    return y, keys, values


def in_float64(case: Case, given: dict[str, Array], keys: Array, values: Array) -> Array:
    """Attention row by row over what the caches hold after the call."""
    batch, groups = len(case.past), case.heads // case.kv_heads
    qkv = given["qkv"].astype(np.float64).reshape(batch, case.tokens, -1, case.dim)
    out = np.empty((batch, case.tokens, case.heads, case.dim))
    for b, past in enumerate(case.past):
        for s in range(case.tokens):
            place = min(past + s, case.positions - 1)
            turn = np.exp(1j * np.arctan2(given["sin"][place].astype(float), given["cos"][place].astype(float)))
            for h in range(case.heads):
                q, kv, seen = qkv[b, s, h], h // groups, min(past + s + 1, case.max_len)
                if case.qk_norm:
                    q = q / math.sqrt((q @ q) / case.dim + EPSILON) * given["q_norm"].astype(float)
                turned = (q[: case.dim // 2] + 1j * q[case.dim // 2 :]) * turn
                k, v = keys[b, kv, :seen].astype(float), values[b, kv, :seen].astype(float)
                if case.int8:
                    k, v = k * given["key_scale"][kv].astype(float), v * given["value_scale"][kv].astype(float)
                scores = k @ np.concatenate((turned.real, turned.imag)) / math.sqrt(case.dim)
                weights = np.exp(scores - scores.max())
                out[b, s, h] = weights / weights.sum() @ v
    return out.reshape(batch, case.tokens, -1)


def check_cache(case: Case, before: Array, after: Array, expected: Array) -> None:
    """New rows as in the contract, but for the last place: a device fuses products and sums. The rest as it was."""
    new = np.zeros(case.cache[:3], bool)
    for row, past in enumerate(case.past):
        new[row, :, past : past + case.tokens] = True
    np.testing.assert_array_equal(after[~new].view(np.uint8), before[~new].view(np.uint8))
    if case.int8:
        assert np.abs(after[new].astype(int) - expected[new]).max(initial=0) <= 1
        assert (after[new] == expected[new]).mean() > 0.99 if new.any() else True
    else:
        np.testing.assert_allclose(after[new], expected[new], rtol=1.1e-3, atol=4e-3)
        assert (after[new] == expected[new]).mean() > 0.97 if new.any() else True


def check(kernels: Kernels, case: Case, rng: np.random.Generator) -> None:
    given = inputs_of(case, rng)
    y, keys, values = run(kernels, case, given)
    expected, expected_keys, expected_values = operator(case, given)
    check_cache(case, given["key_cache"], keys, expected_keys)
    check_cache(case, given["value_cache"], values, expected_values)
    # fp16: weights, the query and the output are rounded to 11 bits.
    held = np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=4e-3 * held)
    exact = in_float64(case, given, keys, values)
    np.testing.assert_allclose(y, exact, rtol=0, atol=6e-3 * held)
    assert np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)) < 1.5e-3


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("model", [QWEN_1_5B, QWEN_0_5B, LLAMA_8B], ids=["qwen-1.5b", "qwen-0.5b", "llama-8b"])
@pytest.mark.parametrize("tokens", [1, 11])
def test_models(kernels: Kernels, rng: np.random.Generator, model: Case, int8: bool, tokens: int) -> None:
    check(kernels, replace(model, int8=int8, tokens=tokens), rng)


@pytest.mark.parametrize("tokens", [*range(1, 9), 9, 40])
def test_ragged_batches(kernels: Kernels, rng: np.random.Generator, tokens: int) -> None:
    """Pasts of none, below and at a split's and a tile's end, and ones that leave splits without keys."""
    check(kernels, replace(SMALL, tokens=tokens), rng)


@pytest.mark.parametrize("tokens", [1, 8, 70])
@pytest.mark.parametrize("int8", [False, True])
def test_norms_of_queries_and_keys(kernels: Kernels, rng: np.random.Generator, tokens: int, int8: bool) -> None:
    check(kernels, replace(SMALL, past=(0, 90), tokens=tokens, int8=int8, qk_norm=True), rng)


@pytest.mark.parametrize("tokens", [3, 24])
@pytest.mark.parametrize("int8", [False, True])
def test_tokens_behind_the_cache_are_dropped(
    kernels: Kernels, rng: np.random.Generator, tokens: int, int8: bool
) -> None:
    """One sequence runs over the cache's end within the call, one is behind it, and the angles end sooner still."""
    case = Case(4, 2, 64, past=(69, 10, 71, 80), tokens=tokens, max_len=71, positions=70, int8=int8)
    check(kernels, case, rng)


@pytest.mark.parametrize("tokens", [1, 33])
def test_a_cache_that_is_no_multiple_of_anything(kernels: Kernels, rng: np.random.Generator, tokens: int) -> None:
    check(kernels, Case(3, 3, 128, past=(0, 1), tokens=tokens, max_len=37, positions=37), rng)


@pytest.mark.parametrize("tokens", [1, 12])
def test_large_scores_do_not_overflow(kernels: Kernels, rng: np.random.Generator, tokens: int) -> None:
    """Scores of several thousand: one key takes all the weight."""
    case = replace(SMALL, past=(40,), tokens=tokens, max_len=80)
    given = inputs_of(case, rng)
    given["qkv"] = np.clip(given["qkv"].astype(np.float32) * 60, -400, 400).astype(np.float16)
    y, _, _ = run(kernels, case, given)
    assert np.isfinite(y).all()
    expected = operator(case, given)[0]
    agreed = np.isclose(y, expected, rtol=2e-2, atol=2e-2 * np.abs(expected).max())
    assert agreed.mean() > 0.97, "but for ties between keys, whose query is rounded"


@pytest.mark.parametrize("sms", [1, 4, 132])
def test_however_many_multiprocessors(emulator: Kernels, rng: np.random.Generator, sms: int) -> None:
    """From one split to more splits than there are keys for."""
    emulator.configure(0, sms)
    try:
        check(emulator, replace(SMALL, past=(0, 130, 300), max_len=320, tokens=2), rng)
    finally:
        emulator.configure(0)


def test_workspace_serves_smaller_calls(emulator: Kernels) -> None:
    def workspace(batch: int, tokens: int) -> int:
        return int(emulator.library.orin_kv_attention_workspace(batch, tokens, 12, 2, 128, 4096))

    sizes = [[workspace(batch, tokens) for tokens in (1, 2, 3, 5, 8, 9, 64)] for batch in (1, 2, 3, 7, 8)]
    grows = np.array(sizes)
    assert (np.diff(grows, axis=0) >= 0).all()
    assert (np.diff(grows, axis=1) >= 0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 96}, "head_dim is 96, want 64 or 128"),
        ({"num_heads": 7}, "num_heads 7 is no multiple of kv_num_heads 2"),
        ({"max_len": 0}, "max_len is 0"),
        ({"max_positions": 0}, "max_positions is 0"),
        ({"batch": 40000}, "batch \\* kv_num_heads is 80000, want 65535 or fewer"),
        ({"tokens": -1}, "tokens -1"),
        ({"qkv": None}, "qkv is NULL"),
        ({"value_cache": 8}, "value_cache is not aligned to 16 bytes"),
        ({"past_lengths": None}, "past_lengths is NULL"),
        ({"q_norm": 256}, "q_norm and k_norm are given both or not at all"),
        ({"int8_cache": 1}, "key_scale is NULL"),
        ({"key_scale": 256}, "scales are for an int8 cache"),
    ],
)
def test_refuses(kernels: Kernels, rng: np.random.Generator, changed: dict[str, Any], message: str) -> None:
    case = replace(SMALL, past=(0,))
    with pytest.raises(KernelError, match=message) as error:
        run(kernels, case, inputs_of(case, rng), **changed)
    assert error.value.status == Kernels.BAD_ARGUMENT


def test_refuses_a_small_workspace(kernels: Kernels, rng: np.random.Generator) -> None:
    case = replace(SMALL, past=(0,))
    with pytest.raises(KernelError, match="the workspace has 3072 bytes, want [0-9]+") as error:
        given = inputs_of(case, rng)
        buffers = {name: kernels.put(array) for name, array in given.items()}
        args = KvAttentionArgs(
            batch=1, tokens=1, num_heads=6, kv_num_heads=2, head_dim=64, max_len=200, max_positions=400, scale=1,
            y=buffers["qkv"].address, **{name: buffer.address for name, buffer in buffers.items()},
        )  # fmt: skip
        kernels.call("orin_kv_attention", ctypes.byref(args), kernels.empty(3072, np.uint8), 3072)
    assert error.value.status == Kernels.SMALL_WORKSPACE


def test_nothing_to_do(kernels: Kernels, rng: np.random.Generator) -> None:
    case = replace(SMALL, past=(5,), tokens=0)
    given = inputs_of(case, rng)
    _, keys, _ = run(kernels, case, given)
    np.testing.assert_array_equal(keys.view(np.uint8), given["key_cache"].view(np.uint8))
