"""The quantizer against its own definition in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from orin_kit.errors import UserError
from orin_kit.quantize.int4 import quantize_groups


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def scales64(scales: np.ndarray) -> np.ndarray:
    return scales.astype(np.float64)[..., None]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_weight_is_the_nearest_step(
    rng: np.random.Generator, bits: int, symmetric: bool, dtype: type, size: int
) -> None:
    weight = (rng.standard_normal((130, 256)) * rng.uniform(0.001, 1, (130, 1)) + rng.normal(0, 0.1)).astype(dtype)
    packed = quantize_groups(weight, size, bits=bits, symmetric=symmetric)
    assert packed.scales.dtype == np.float16 and (packed.scales > 0).all()
    assert (packed.bits, packed.shape, packed.group_size, packed.order) == (bits, (130, 256), size, None)
    if symmetric:
        assert packed.zero_points is None
        zeros = np.full((130, 256 // size, 1), 2.0 ** (bits - 1))
    else:
        assert packed.zero_points is not None and packed.zero_points.dtype == np.uint8
        zeros = packed.zero_points.astype(np.float64)[..., None]
    steps = weight.astype(np.float64).reshape(130, -1, size) / scales64(packed.scales)
    nearest = np.clip(np.rint(steps) + zeros, 0, 2**bits - 1)
    off = np.abs(packed.codes().reshape(130, -1, size) - nearest)
    assert off.max() <= 1 and off.mean() < 1e-3  # fp32 division may tip a tie


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_codes_span_the_range(rng: np.random.Generator, bits: int) -> None:
    """Without a search: the scale is (max - min) / (2^bits - 1) with zero inside, in float64."""
    weight = rng.uniform(0.5, 2, (40, 128)).astype(np.float32)
    weight[::2] -= 1.3
    packed = quantize_groups(weight, 64, bits=bits, symmetric=False, search=False)
    groups = weight.astype(np.float64).reshape(40, 2, 64)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    np.testing.assert_allclose(packed.scales, (high - low) / (2**bits - 1), rtol=1e-3)
    scales = packed.scales.astype(np.float64)
    assert np.abs(packed.zero_points - np.rint(-low / scales)).max() <= 1
    lost = np.abs(packed.dense().reshape(40, 2, 64) - groups)
    assert (lost <= scales[..., None] * (1.01 if bits == 4 else 1.6)).all()  # the rounded zero point shifts both ends


def test_zero_points_help_where_weights_lie_to_one_side(rng: np.random.Generator) -> None:
    weight = rng.uniform(-0.2, 1, (64, 256)).astype(np.float32)
    lost = [
        np.square(quantize_groups(weight, 128, symmetric=symmetric).dense() - weight).sum()
        for symmetric in (True, False)
    ]
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_loses_less_than_any_plain_range(rng: np.random.Generator, symmetric: bool) -> None:
    weight = rng.standard_t(5, (256, 512)).astype(np.float32)
    groups = weight.astype(np.float64).reshape(256, 4, 128)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)

    def error(scale: np.ndarray, zero: np.ndarray | int) -> float:
        codes = np.clip(np.rint(groups / scale) + zero, 0, 15)
        return float(np.square((codes - zero) * scale - groups).sum())

    if symmetric:
        largest = np.maximum(high, -low)
        plain = [error(largest / steps, 8) for steps in (7, 7.5, 8)]
    else:
        scale = (high - low) / 15
        plain = [error(scale, np.rint(-low / scale))]
    packed = quantize_groups(weight, 128, symmetric=symmetric)
    assert float(np.square(packed.dense().astype(np.float64) - weight).sum()) < 0.95 * min(plain)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gram_lowers_the_error_of_the_outputs(rng: np.random.Generator, symmetric: bool) -> None:
    x = rng.standard_normal((400, 256)) * np.exp(rng.standard_normal(256) * 1.5)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    groups = x.reshape(-1, 2, 128).transpose(1, 0, 2)
    gram = (groups.transpose(0, 2, 1) @ groups / len(x)).astype(np.float32)

    def error(**options: np.ndarray) -> float:
        lost = (quantize_groups(weight, 128, symmetric=symmetric, **options).dense() - weight).astype(np.float64)
        # Group by group, which is what the scales are chosen for.
        return sum(float(np.square(x[:, g] @ lost[:, g].T).sum()) for g in (slice(0, 128), slice(128, 256)))

    assert error(gram=gram) < 0.97 * error()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_and_tiny_groups(rng: np.random.Generator, symmetric: bool) -> None:
    weight = rng.standard_normal((3, 64)).astype(np.float32)
    weight[0] = 0
    weight[1] *= 1e-7
    packed = quantize_groups(weight, 32, symmetric=symmetric)
    restored = packed.dense()
    assert (restored[0] == 0).all() and (packed.scales > 0).all()
    assert np.abs(restored[1] - weight[1]).max() <= np.finfo(np.float16).smallest_subnormal


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(bad: float) -> None:
    weight = np.ones((4, 64), np.float32)
    weight[2, 5] = bad
    with pytest.raises(UserError, match=r"layers\.3.*NaN or infinite"):
        quantize_groups(weight, 64, name="layers.3")


def test_weights_beyond_fp16_scales_are_named() -> None:
    with pytest.raises(UserError, match="big.*fp16"):
        quantize_groups(np.full((2, 32), 1e6, np.float32), 32, name="big")


def test_groups_that_do_not_fit_name_the_layer_and_a_size_that_does() -> None:
    weight = np.ones((4, 896 + 64), np.float32)
    with pytest.raises(UserError, match=r"up_proj has 960 .*--group-size 64"):
        quantize_groups(weight, 128, name="up_proj")
    with pytest.raises(UserError, match="use one of 32, 64"):
        quantize_groups(weight, 60)
