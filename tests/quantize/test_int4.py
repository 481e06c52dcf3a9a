"""The packing against compressed-tensors and onnxruntime, the quantizer against its own definition in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from onnx import TensorProto, helper

from orin_kit.errors import UserError
from orin_kit.quantize.int4 import GROUP_SIZES, dequantize, matmulnbits_blob, pack, quantize_groups, unpack


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def test_packing_is_that_of_compressed_tensors(rng: np.random.Generator) -> None:
    q = rng.integers(-8, 8, (37, 256), dtype=np.int8)
    packed = pack(q)
    np.testing.assert_array_equal(packed, pack_to_int32(torch.from_numpy(q), 4).numpy())
    np.testing.assert_array_equal(unpack(packed), q)
    np.testing.assert_array_equal(unpack_from_int32(torch.from_numpy(packed), 4, q.shape).numpy(), q)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_blob_is_what_matmulnbits_multiplies_with(rng: np.random.Generator, group_size: int) -> None:
    rows, columns = 48, 512
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    q, scales = quantize_groups(weight, group_size)
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "scales"], ["y"], domain="com.microsoft",
        N=rows, K=columns, bits=4, block_size=group_size, accuracy_level=0,
    )  # fmt: skip
    blob = matmulnbits_blob(pack(q), group_size)
    scales32 = scales.astype(np.float32)
    tensors = [onnx.numpy_helper.from_array(blob, "b"), onnx.numpy_helper.from_array(scales32, "scales")]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, rows])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.standard_normal((5, columns)).astype(np.float32)
    reference = x.astype(np.float64) @ (q.reshape(rows, -1, group_size) * scales64(scales)).reshape(rows, columns).T
    np.testing.assert_allclose(session.run(None, {"x": x})[0], reference, atol=2e-4)
    np.testing.assert_allclose(x @ dequantize(q, scales, group_size).T, reference, atol=2e-4)


def scales64(scales: np.ndarray) -> np.ndarray:
    return scales.astype(np.float64)[..., None]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_weight_is_the_nearest_step(rng: np.random.Generator, bits: int, dtype: type) -> None:
    weight = (rng.standard_normal((130, 256)) * rng.uniform(0.001, 1, (130, 1))).astype(dtype)
    q, scales = quantize_groups(weight, 64, bits=bits)
    assert q.dtype == np.int8 and scales.dtype == np.float16 and (scales > 0).all()
    steps = weight.astype(np.float64).reshape(130, 4, 64) / scales64(scales)
    nearest = np.clip(np.rint(steps), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    off = np.abs(q.reshape(130, 4, 64) - nearest)
    assert off.max() <= 1 and off.mean() < 1e-3  # fp32 division may tip a tie


def test_search_loses_less_than_any_plain_scale(rng: np.random.Generator) -> None:
    weight = rng.standard_t(5, (256, 512)).astype(np.float32)

    def error(scale: np.ndarray) -> float:
        groups = weight.astype(np.float64).reshape(256, 4, 128)
        return float(np.square(np.clip(np.rint(groups / scale), -8, 7) * scale - groups).sum())

    q, scales = quantize_groups(weight, 128)
    largest = np.abs(weight.reshape(256, 4, 128)).max(-1, keepdims=True).astype(np.float64)
    found = float(np.square(dequantize(q, scales, 128).astype(np.float64) - weight).sum())
    assert found < min(error(largest / 7), error(largest / 7.5), error(largest / 8))


def test_gram_lowers_the_error_of_the_outputs(rng: np.random.Generator) -> None:
    x = rng.standard_normal((400, 256)) * np.exp(rng.standard_normal(256) * 1.5)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    groups = x.reshape(-1, 2, 128).transpose(1, 0, 2)
    gram = (groups.transpose(0, 2, 1) @ groups / len(x)).astype(np.float32)

    def error(**options: np.ndarray) -> float:
        lost = (dequantize(*quantize_groups(weight, 128, **options), 128) - weight).astype(np.float64)
        # Group by group, which is what the scales are chosen for.
        return sum(float(np.square(x[:, g] @ lost[:, g].T).sum()) for g in (slice(0, 128), slice(128, 256)))

    assert error(gram=gram) < 0.97 * error()


def test_zero_and_tiny_groups(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((3, 64)).astype(np.float32)
    weight[0] = 0
    weight[1] *= 1e-7
    q, scales = quantize_groups(weight, 32)
    restored = dequantize(q, scales, 32)
    assert (restored[0] == 0).all() and (scales > 0).all()
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
