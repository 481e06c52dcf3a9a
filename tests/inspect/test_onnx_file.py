"""The reader of ONNX files sees what the onnx package sees, and refuses everything that is not whole."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from families import save_model
from orin_kit.errors import ArtifactError
from orin_kit.export.export import export
from orin_kit.inspect.onnx_file import DTYPES, external_files, read_onnx
from orin_kit.quantize.quantize import quantize


def save(path: Path, *, external: bool = False) -> onnx.ModelProto:
    """A graph with a subgraph, typed and raw constants, a scalar, and a random weight."""
    rng = np.random.default_rng()
    weight = numpy_helper.from_array(rng.normal(size=(int(rng.integers(2, 40)), 3)).astype(np.float32), "w")
    typed = helper.make_tensor("typed", TensorProto.INT64, [3], [1, -2, 3])
    four = helper.make_tensor("four", TensorProto.INT4, [5], [1, 2, 3, -4, 5])
    scalar = numpy_helper.from_array(np.array(True), "scalar")
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["n"])], "then", [], [helper.make_tensor_value_info("n", 1, None)]
    )
    nodes = [
        helper.make_node("If", ["scalar"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("Mine", ["y", "w"], ["z"], domain="com.mine"),
        helper.make_node("Neg", ["z"], ["out"], domain="ai.onnx"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 3]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [7, None])],
        initializer=[weight, typed, four, scalar],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.mine", 3)]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="test", ir_version=9)
    onnx.save(model, path, save_as_external_data=external, location="data.bin", size_threshold=0)
    return model


def test_a_file_of_every_kind_of_field(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx")
    found = read_onnx(tmp_path / "m.onnx")
    assert (found.producer, found.ir_version, found.opsets) == ("test", 9, {"": 21, "com.mine": 3})
    assert found.ops == {("", "If"): 1, ("", "Neg"): 3, ("com.mine", "Mine"): 1}
    assert [(v.name, v.dtype, v.shape) for v in found.inputs] == [("x", "F16", ("batch", 3))]
    assert [(v.name, v.dtype, v.shape) for v in found.outputs] == [("out", "F32", (7, "?"))]
    expected = {t.name: (tuple(t.dims), numpy_helper.to_array(t).nbytes) for t in model.graph.initializer}
    expected["four"] = ((5,), 3)  # two in a byte
    assert {i.name: (i.shape, i.bytes) for i in found.initializers} == expected


def test_every_type_that_onnx_knows_is_known() -> None:
    assert set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED} <= DTYPES.keys()


@pytest.mark.parametrize(("family", "dialect", "int4"), [("qwen3", "ort", False), ("qwen2", "reference", True),
                                                         ("conv", "ort", True)])  # fmt: skip
def test_exported_graphs(tmp_path: Path, family: str, dialect: str, int4: bool) -> None:
    save_model(tmp_path / "hf", family)
    checkpoint = tmp_path / "hf"
    if int4:
        checkpoint = tmp_path / "int4"
        quantize(tmp_path / "hf", checkpoint, method="rtn", perplexity=False)
    export(checkpoint, tmp_path / "onnx", dialect=dialect, progress=False)
    found = read_onnx(tmp_path / "onnx/model.onnx")
    model = onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False)
    assert found.ops == Counter((node.domain, node.op_type) for node in model.graph.node)
    assert [v.name for v in found.inputs] == [v.name for v in model.graph.input]
    dims = [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.output]
    assert [v.shape for v in found.outputs] == dims
    assert {i.name: i.shape for i in found.initializers} == {t.name: tuple(t.dims) for t in model.graph.initializer}
    lengths = {t.name: int(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "length"}
    assert lengths and {i.name: i.bytes for i in found.initializers if i.file} == lengths
    assert external_files(found) == {"model.onnx.data": (tmp_path / "onnx/model.onnx.data").stat().st_size}


def test_every_cut_and_garbage_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    rng = np.random.default_rng()
    whole = read_onnx(tmp_path / "m.onnx")
    for size in range(len(data)):
        path.write_bytes(data[:size])
        try:
            read = read_onnx(path)
        except ArtifactError as error:
            assert "cut.onnx is cut short or no ONNX model" in error.what
        else:  # cut between two whole fields behind the graph, where only opsets are lost
            assert read.ops == whole.ops and read.opsets != whole.opsets
    for _ in range(100):  # never another error, whatever the bytes
        path.write_bytes(rng.integers(0, 256, int(rng.integers(0, 200)), np.uint8).tobytes())
        with pytest.raises(ArtifactError, match="cut short or no ONNX model"):
            read_onnx(path)
    for _ in range(100):
        broken = bytearray(data)
        broken[int(rng.integers(len(data)))] = int(rng.integers(256))
        path.write_bytes(broken)
        with contextlib.suppress(ArtifactError):
            read_onnx(path)


def test_external_files_are_there_and_long_enough(tmp_path: Path) -> None:
    save(tmp_path / "m.onnx", external=True)
    found = read_onnx(tmp_path / "m.onnx")
    assert [i.name for i in found.initializers if i.file]
    data = tmp_path / "data.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"data\.bin is cut short"):
        read_onnx(tmp_path / "m.onnx")
    data.unlink()
    with pytest.raises(ArtifactError, match=r"lacks data\.bin"):
        read_onnx(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="outside of it"):
        read_onnx(tmp_path / "m.onnx")
