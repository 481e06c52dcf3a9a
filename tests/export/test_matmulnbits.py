"""The inputs made for onnxruntime's MatMulNBits, multiplied by onnxruntime, against float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from orin_kit.export.dialects.matmulnbits import blob, zero_points
from orin_kit.models.packing import PackedWeight, pack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_matmulnbits_multiplies_with_the_weight(bits: int, group_size: int, asymmetric: bool) -> None:
    rng = np.random.default_rng()
    rows, columns = 48, 3 * 128  # an odd number of groups of 128: zero points fill half a byte
    scales = rng.uniform(0.001, 0.1, (rows, columns // group_size)).astype(np.float16)
    points = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if asymmetric else None
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    weight = PackedWeight(bits, pack(codes, bits), scales, points)
    stored = {"b": blob(weight), "scales": scales.astype(np.float32)}
    if (packed := zero_points(weight)) is not None:
        stored["zero_points"] = packed
    node = helper.make_node(
        "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft",
        N=rows, K=columns, bits=bits, block_size=group_size, accuracy_level=0,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, rows])],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = rng.standard_normal((5, columns)).astype(np.float32)
    zeros = np.full(scales.shape, 1 << bits - 1) if points is None else points
    groups = codes.reshape(rows, -1, group_size).astype(np.float64) - zeros[..., None]
    expected = x.astype(np.float64) @ (groups * scales.astype(np.float64)[..., None]).reshape(rows, columns).T
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())
