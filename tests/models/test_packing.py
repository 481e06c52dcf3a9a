"""The canonical packing against compressed-tensors and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

from orin_kit.models.packing import PackedWeight, middle, pack, unpack


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_compressed_tensors(rng: np.random.Generator, bits: int) -> None:
    codes = rng.integers(0, 1 << bits, (37, 256), dtype=np.uint8)
    signed = torch.from_numpy((codes.astype(np.int16) - middle(bits)).astype(np.int8))
    packed = pack(codes, bits)
    np.testing.assert_array_equal(packed, pack_to_int32(signed, bits).numpy())
    np.testing.assert_array_equal(unpack(packed, bits), codes)
    assert torch.equal(unpack_from_int32(torch.from_numpy(packed), bits, signed.shape), signed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_dense_is_the_definition(rng: np.random.Generator, bits: int, zero_points: bool, ordered: bool) -> None:
    rows, columns, size = 21, 192, 64
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = rng.uniform(0.001, 1, (rows, columns // size)).astype(np.float16)
    points = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if zero_points else None
    order = rng.permutation(columns).astype(np.int32) if ordered else None
    weight = PackedWeight(bits, pack(codes, bits), scales, points, order)
    assert weight.shape == (rows, columns) and weight.group_size == size
    expected = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            zero = 2 ** (bits - 1) if points is None else int(points[row, column // size])
            feature = column if order is None else order[column]
            expected[row, feature] = (int(codes[row, column]) - zero) * float(scales[row, column // size])
    np.testing.assert_allclose(weight.dense(), expected, rtol=1e-6)


@pytest.mark.parametrize("zero_points", [False, True])
def test_smaller_groups_are_the_same_weight(rng: np.random.Generator, zero_points: bool) -> None:
    codes = rng.integers(0, 16, (8, 384), dtype=np.uint8)
    scales = rng.uniform(0.001, 1, (8, 2)).astype(np.float16)
    points = rng.integers(0, 16, scales.shape, dtype=np.uint8) if zero_points else None
    weight = PackedWeight(4, pack(codes), scales, points, rng.permutation(384).astype(np.int32))
    smaller = weight.regrouped(64)
    assert smaller.group_size == 64
    np.testing.assert_array_equal(smaller.dense(), weight.dense())
