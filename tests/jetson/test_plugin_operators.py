"""What operators.h says of our plugins, against the graphs that the dialect trt_plugin writes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import onnx
import pytest

from families import save_model
from kernels import PLUGINS
from orin_kit.export.export import export
from orin_kit.export.plugin_ops import DOMAIN
from orin_kit.quantize.quantize import quantize

WRAPPERS = PLUGINS / "tensorrt"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: install g++, or name one in CXX")

BITS = {"float16": 1, "float32": 2, "int8": 4, "int32": 8, "int64": 16}  # element type -> its bit in operators.h
KINDS = {1: onnx.AttributeProto.INT, 2: onnx.AttributeProto.FLOAT, 3: onnx.AttributeProto.STRING}

TABLE = """
#include <cstdio>
#include "operators.h"
int main() {
  using namespace orin::trt;
  std::printf("%s %s\\n", kNamespace, kVersion);
  for (const Operator* op : kOperators) {
    std::printf("op %s\\n", op->name);
    for (int i = 0; i < op->attribute_count(); ++i)
      std::printf("attribute %s %d\\n", op->attributes[i].name, int(op->attributes[i].kind));
    for (int set = 0; set < 4; ++set)
      for (int at = 0; input_at(*op, at, set & 1, set & 2) >= 0; ++at) {
        const Input& input = op->inputs[input_at(*op, at, set & 1, set & 2)];
        std::printf("input%d %s %u %d\\n", set, input.name, input.types, input.when == When::kMaybe);
      }
    for (int i = 0; i < op->output_count(); ++i)
      std::printf("output %s %u %d\\n", op->outputs[i].name, op->outputs[i].types, op->outputs[i].aliased);
  }
}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]]]:
    """Namespace and version in operators.h, and operator -> "attribute", "input0" .. "input3", "output" -> rows."""
    assert COMPILER is not None
    home = tmp_path_factory.mktemp("table")
    (home / "table.cpp").write_text(TABLE)
    command = [COMPILER, "-std=c++17", f"-I{WRAPPERS}", str(home / "table.cpp"), "-o", str(home / "table")]
    subprocess.run(command, check=True)
    first, *lines = subprocess.run([home / "table"], check=True, capture_output=True, text=True).stdout.splitlines()
    operators: dict[str, dict[str, Any]] = {}
    for kind, *rest in map(str.split, lines):
        if kind == "op":
            current = operators.setdefault(rest[0], {})
        else:
            current.setdefault(kind, []).append(rest)
    return first, operators


GRAPHS: dict[str, dict[str, Any]] = {
    "qwen3-int8-cache": dict(family="qwen3", kv_bits=8, activations="fp16"),
    "qwen3-fp16-cache": dict(family="qwen3", kv_bits=16, activations="fp16"),
    "qwen2-biases": dict(family="qwen2", kv_bits=8, activations="fp16"),
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], onnx.ModelProto]:
    """Graphs of trt_plugin: one table with the head; an embedding in rows of its own where tie is False."""
    home = tmp_path_factory.mktemp("graphs")

    def graph(name: str, **more: Any) -> onnx.ModelProto:
        how = dict(GRAPHS[name])
        family = how.pop("family")
        packed = home / family
        if not packed.exists():
            save_model(home / f"{family}-hf", family, num_hidden_layers=1)
            quantize(
                home / f"{family}-hf", packed, method="rtn", group_size=64, perplexity=False, embedding_bits=4,
                kv_bits=8, samples=4, sample_length=64,
            )  # fmt: skip
        out = home / f"{name}-{len(list(home.iterdir()))}"
        export(packed, out, dialect="trt_plugin", progress=False, **how, **more)
        return onnx.load(out / "model.onnx", load_external_data=False)

    return graph


def types_of(graph: onnx.GraphProto) -> dict[str, str]:
    """Element type of every value that the graph names one for."""
    typed = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    typed |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    casts = [(node, a) for node in graph.node for a in node.attribute if node.op_type == "Cast" and a.name == "to"]
    typed |= {node.output[0]: attribute.i for node, attribute in casts}
    return {name: onnx.helper.tensor_dtype_to_np_dtype(number).name for name, number in typed.items() if number}


def check_node(node: onnx.NodeProto, op: dict[str, Any], types: dict[str, str], header: str) -> None:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    named = f"{attributes.pop('plugin_namespace').s.decode()} {attributes.pop('plugin_version').s.decode()}"
    assert named == header
    assert {name: a.type for name, a in attributes.items()} == {n: KINDS[int(kind)] for n, kind in op["attribute"]}
    assert all(node.input), "an input is left out in between"
    qk_norm = "qk_norm" in attributes and attributes["qk_norm"].i
    int8_cache = node.op_type == "KvAttention" and types[node.input[1]] == "int8"
    inputs = op[f"input{int(bool(qk_norm)) + 2 * int8_cache}"]
    assert sum(maybe == "0" for *_, maybe in inputs) <= len(node.input) <= len(inputs)
    for value, (name, allowed, _) in zip(node.input, inputs, strict=False):
        assert BITS.get(types[value], 0) & int(allowed), f"{node.op_type}: {name} is {types[value]}"
    assert len(node.output) <= len(op["output"])
    for value, (name, allowed, aliased) in zip(node.output, op["output"], strict=False):
        assert BITS.get(types[value], 0) & int(allowed), f"{node.op_type}: {name} is {types[value]}"
        if int(aliased) >= 0:
            assert types[value] == types[node.input[int(aliased)]]


@needs_compiler
@pytest.mark.parametrize("name", GRAPHS)
def test_operators_are_those_of_the_graphs(
    table: tuple[str, dict[str, dict[str, Any]]], graphs: Callable[..., onnx.ModelProto], name: str
) -> None:
    header, operators = table
    graph = graphs(name).graph
    nodes = [node for node in graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == set(operators)
    assert any(len(node.input) == 4 for node in nodes if node.op_type == "Int4Linear") == (name == "qwen2-biases")
    types = types_of(graph)
    for node in nodes:
        check_node(node, operators[node.op_type], types, header)


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
def test_tables_in_rows(
    table: tuple[str, dict[str, dict[str, Any]]], graphs: Callable[..., onnx.ModelProto], bits: int
) -> None:
    header, operators = table
    graph = graphs("qwen3-fp16-cache", tie=False, embedding_bits=bits).graph
    (node,) = [node for node in graph.node if node.op_type == "EmbeddingGather"]
    check_node(node, operators["EmbeddingGather"], types_of(graph), header)
