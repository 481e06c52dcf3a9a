"""orin_layout.h, the index arithmetic of the kernels, against `interleave.py` and against what the plans promise."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_uint32, c_uint64
from typing import Any

import numpy as np
import pytest

from kernels import Kernels
from orin_kit.export.interleave import interleave, tiles
from orin_kit.models.packing import PackedWeight, pack

ARGUMENTS: dict[str, tuple[Any, list[Any]]] = {
    "nibble_place": (None, [c_int, c_int, c_int, POINTER(c_int64), POINTER(c_int)]),
    "pair_feature": (c_int, [c_int] * 3),
    "magic_low": (c_uint32, [c_uint32]),
    "magic_high": (c_uint32, [c_uint32]),
    "gemv_plan": (None, [c_int] * 3 + [POINTER(c_int)]),
    "gemm_plan": (None, [c_int] * 4 + [POINTER(c_int)]),
    "gemm_workspace": (c_size_t, [c_int] * 4),
    "decode_splits": (c_int, [c_int] * 5),
    "split_keys": (c_int, [c_int] * 2),
    "active_splits": (c_int, [c_int] * 2),
    "key_element": (c_int, [c_int] * 4),
    "value_element": (c_int, [c_int] * 3),
    "value_load": (c_int, [c_int] * 2),
    "x_swizzle": (c_int, [c_int] * 2),
    "argmax_key": (c_uint64, [c_uint32] * 2),
    "argmax_index": (c_uint32, [c_uint64]),
}


class Layout:
    """The functions by their names in orin_layout.h."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in ARGUMENTS.items():
            function = getattr(library, f"layout_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def plan(self, name: str, *arguments: int) -> list[int]:
        out = (c_int * 5)()
        getattr(self, name)(*arguments, out)
        return list(out)


@pytest.fixture(scope="module")
def layout(emulator: Kernels) -> Layout:
    return Layout(emulator.library)


def test_nibbles_lie_where_interleave_puts_them(layout: Layout, rng: np.random.Generator) -> None:
    rows, columns = 40, 640
    codes = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    scales = np.ones((rows, columns // 128), np.float16)
    words = interleave(PackedWeight(4, pack(codes), scales)).view(np.uint32)
    assert words.shape == tiles(rows, columns)
    flat = words.ravel()
    word, nibble = c_int64(), c_int()
    for n, k in zip(rng.integers(0, rows, 500), rng.integers(0, columns, 500), strict=True):
        layout.nibble_place(int(n), int(k), columns, byref(word), byref(nibble))
        assert flat[word.value] >> (4 * nibble.value) & 15 == codes[n, k]


def test_a_pair_is_two_neighbours_that_one_shift_and_mask_fetch(layout: Layout) -> None:
    """`pair_feature` says of thread, word and pair what `nibble_place` says of the feature."""
    word, nibble = c_int64(), c_int()
    seen = set()
    for t in range(4):
        for w in range(4):
            for p in range(4):
                feature = layout.pair_feature(t, w, p)
                for neighbour in range(2):
                    layout.nibble_place(3, feature + neighbour, 128, byref(word), byref(nibble))
                    assert (word.value, nibble.value) == (3 * 16 + t * 4 + w, p + 4 * neighbour)
                    seen.add(feature + neighbour)
    assert seen == set(range(128))


def test_magic_numbers_are_the_codes(layout: Layout, rng: np.random.Generator) -> None:
    word = int(rng.integers(1 << 32))
    for shift in (0, 8):
        low, high = layout.magic_low(word >> shift & 0xFFFFFFFF), layout.magic_high(word >> shift & 0xFFFFFFFF)
        for half in range(2):
            at = shift + 16 * half
            if at + 8 > 32:  # the shift has brought zeros
                continue
            as_half = np.array([low >> 16 * half & 0xFFFF, high >> 16 * half & 0xFFFF], np.uint16).view(np.float16)
            codes = [word >> at & 15, word >> (at + 4) & 15]
            np.testing.assert_array_equal(as_half, [1024 + codes[0], 1024 + 16 * codes[1]])


@pytest.mark.parametrize("sms", [1, 8, 16, 132])
def test_gemv_plans_cover_all_tiles_and_fill_the_machine(layout: Layout, rng: np.random.Generator, sms: int) -> None:
    for _ in range(200):
        n, k = 8 * int(rng.integers(1, 20000)), 128 * int(rng.integers(1, 200))
        tiles_of_block, warps, blocks = layout.plan("gemv_plan", n, k, sms)[:3]
        assert tiles_of_block in {1, 2, 4} and warps in {4, 8}
        assert (blocks - 1) * tiles_of_block * 8 < n <= blocks * tiles_of_block * 8
        assert tiles_of_block == 1 or blocks >= 2 * sms


@pytest.mark.parametrize("sms", [1, 8, 16, 132])
def test_gemm_plans_cover_rows_outputs_and_inputs(layout: Layout, rng: np.random.Generator, sms: int) -> None:
    for _ in range(200):
        rows, n, k = int(rng.integers(9, 3000)), 8 * int(rng.integers(1, 2000)), 128 * int(rng.integers(1, 200))
        block_m, blocks_m, blocks_n, splits, of_split = layout.plan("gemm_plan", rows, n, k, sms)
        assert block_m in {16, 32, 64}
        assert (blocks_m - 1) * block_m < rows <= blocks_m * block_m
        assert (blocks_n - 1) * 128 < n <= blocks_n * 128
        assert (splits - 1) * of_split < k // 128 <= splits * of_split  # no split is empty
        assert splits == 1 or (of_split >= 8 and blocks_m * blocks_n * splits <= 2 * sms)
        assert layout.gemm_workspace(rows, n, k, sms) == (0 if splits == 1 else splits * rows * n * 4)


@pytest.mark.parametrize("sms", [8, 16, 132])
def test_decode_splits_cover_all_keys(layout: Layout, rng: np.random.Generator, sms: int) -> None:
    for _ in range(200):
        batch, kv_heads, rows = (int(v) for v in rng.integers(1, [9, 9, 65]))
        max_len = int(rng.integers(1, 40000))
        splits = layout.decode_splits(batch, kv_heads, rows, max_len, sms)
        assert 1 <= splits <= 128
        keys = int(rng.integers(0, max_len + 1))
        active = layout.active_splits(keys, splits)
        assert 1 <= active <= splits
        each = layout.split_keys(max(keys, 1), splits)
        assert each % 64 == 0
        assert keys <= each * active and (active == 1 or each * (active - 1) < keys)


@pytest.mark.parametrize("element_bytes", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_element_of_a_head_is_met_once(layout: Layout, head_dim: int, element_bytes: int) -> None:
    of_key, of_value = 16 // element_bytes, layout.value_load(head_dim, element_bytes)
    keys = [
        layout.key_element(step, t, pair, of_key) + e
        for step in range(head_dim // 16)
        for t in range(4)
        for pair in range(2)
        for e in range(2)
    ]
    values = [layout.value_element(i, g, of_value) for i in range(head_dim // 8) for g in range(8)]
    assert sorted(keys) == sorted(values) == list(range(head_dim))


def test_eight_rows_at_one_chunk_meet_no_bank_twice(layout: Layout) -> None:
    """A row is 128 bytes or a multiple, so the bank of a 16-byte chunk is its place modulo 8; a phase is 8 rows."""
    for chunk in range(32):
        assert len({layout.x_swizzle(row, chunk) % 8 for row in range(8)}) == 8
    for row in range(16):
        for chunks in (8, 16, 32):
            assert {layout.x_swizzle(row, chunk) for chunk in range(chunks)} == set(range(chunks))


def test_argmax_keys_order_like_floats(layout: Layout, rng: np.random.Generator) -> None:
    values = np.concatenate((rng.standard_normal(300) * 10.0 ** rng.integers(-40, 38, 300), [0.0, np.inf, -np.inf]))
    floats = values.astype(np.float32)
    keys = [layout.argmax_key(int(bits), 5) for bits in floats.view(np.uint32)]
    order = np.argsort(np.array(keys, np.uint64), kind="stable")
    assert (np.diff(floats[order]) >= 0).all()
    zeros = [layout.argmax_key(bits, 5) for bits in (0, 0x80000000)]
    assert zeros[0] == zeros[1]
    nan = layout.argmax_key(int(np.float32(np.nan).view(np.uint32)), 0)
    assert all(nan < key for key in keys)
    first, second = layout.argmax_key(0x3F800000, 7), layout.argmax_key(0x3F800000, 8)
    assert first > second
    assert layout.argmax_index(first) == 7
