"""Profiles, bindings and bytes, from the graph alone; compared with what onnx says of the same file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from orin_kit.engine.build import Options, plan_engine
from orin_kit.engine.cache_tensors import cache_layers
from orin_kit.engine.plan import Plan
from orin_kit.errors import ArtifactError, UserError

TYPES = {1: 4, 7: 8, 10: 2, 3: 1, 6: 4}  # bytes of a value, by ONNX's number


def plan(directory: Path, tensorrt: str = "10.3", **options: Any) -> Plan:
    return plan_engine(directory, Options(**options), tensorrt=tensorrt)[1]


def shape_of(value: Any, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(dim.dim_value or sizes[dim.dim_param] for dim in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize("name", ["plugin", "conv"])
def test_profiles_and_bindings(exports: Path, name: str) -> None:
    planned = plan(exports / name, max_batch=4, max_len=200, prefill=64, opt_prefill=32, logits=8)
    graph = onnx.load(exports / name / "model.onnx", load_external_data=False).graph
    sizes = [{"batch": 4, "max_len": 200, "sequence": 64, "logits": 8},
             {"batch": 4, "max_len": 200, "sequence": 1, "logits": 1}]  # fmt: skip
    least = {"batch": 1, "max_len": 200, "sequence": 1, "logits": 1}
    optimal = [least | {"batch": 4, "sequence": 32}, least | {"batch": 4}]
    bindings = {binding.name: binding for binding in planned.bindings}
    assert list(bindings) == [value.name for value in (*graph.input, *graph.output)]
    for profile in (0, 1):
        assert planned.profiles[profile] == {
            value.name: tuple(shape_of(value, each) for each in (least, optimal[profile], sizes[profile]))
            for value in graph.input
        }
    for value in (*graph.input, *graph.output):
        size = math.prod(shape_of(value, sizes[0])) * TYPES[value.type.tensor_type.elem_type]
        assert 0 <= bindings[value.name].bytes - size < 256 and bindings[value.name].bytes % 256 == 0
        assert bindings[value.name].greatest == (shape_of(value, sizes[0]), shape_of(value, sizes[1]))
    shared = {b.name: b.shares for b in planned.bindings if b.shares}
    wanted = {f"present.{n}.{part}": f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")}
    assert shared == (wanted if name == "plugin" else {})
    of_cache = [b for b in planned.bindings if b.name.startswith(("past_key", "past_conv", "present"))]
    assert planned.memory.cache == sum(b.bytes for b in of_cache if not b.shares)
    assert planned.memory.buffers == sum(b.bytes for b in planned.bindings if b not in of_cache)
    stored = sum(
        int(np.prod(tensor.dims)) * (2 if tensor.data_type == 10 else TYPES[tensor.data_type])
        for tensor in graph.initializer
    )
    assert planned.memory.weights == stored
    assert planned.memory.build > 3 * stored and planned.memory.run > stored


def test_plugins_are_those_of_the_nodes(exports: Path) -> None:
    planned = plan(exports / "plugin")
    nodes = onnx.load(exports / "plugin/model.onnx", load_external_data=False).graph.node
    needed = set()
    for node in nodes:
        said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if "plugin_namespace" in said:
            needed.add((node.op_type, said["plugin_version"].decode(), said["plugin_namespace"].decode()))
    assert {(c.name, c.version, c.namespace) for c in planned.creators} == needed != set()
    assert plan(exports / "native", kv="native").creators == ()


def test_a_native_cache_is_written_twice_or_in_place(exports: Path) -> None:
    old, new = (plan(exports / "native", version, kv="native") for version in ("10.3", "10.16"))
    assert old.memory.cache == 2 * new.memory.cache
    assert old.cache_writing == "select" and new.cache_writing.endswith("network API")


def test_the_tensors_that_caches_are_written_from(exports: Path) -> None:
    """In the graph itself: `update` is what reaches the cache, found by computing it."""
    layers = cache_layers(exports / "native/model.onnx")
    assert [layer.past for layer in layers] == [
        f"past_key_values.{n}.{part}" for n in range(2) for part in ("key", "value")
    ]
    model = onnx.load(exports / "native/model.onnx")
    for layer in layers:
        half = onnx.TensorProto.FLOAT16
        model.graph.output.append(onnx.helper.make_tensor_value_info(layer.update, half, None))
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng()
    caches = {layer.past: rng.normal(size=(1, 2, 16, 64)).astype(np.float16) for layer in layers}
    fed = {
        "input_ids": rng.integers(0, 2048, (1, 5)),
        "past_lengths": np.array([3]),
        "logit_positions": np.array([[4]]),
    }
    names = [name for layer in layers for name in (layer.update, layer.present)]
    results = dict(zip(names, session.run(names, fed | caches), strict=True))
    for layer in layers:
        written = caches[layer.past].copy()
        written[:, :, 3:8] = results[layer.update]
        assert np.array_equal(written, results[layer.present])
    with pytest.raises(ArtifactError, match="does not write present"):
        cache_layers(exports / "plugin/model.onnx")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plugin", dict(max_len=300), "--max-len 300 is longer than 256.*--max-len 300"),
        ("plugin", dict(prefill=257), "--prefill 257 is more than --max-len 256"),
        ("plugin", dict(prefill=16, opt_prefill=17), "--opt-prefill 17 is more than --prefill 16"),
        ("plugin", dict(logits=0), "--logits is 0"),
        ("plugin", dict(lora_rank=8), "takes no adapters"),
        ("lora", {}, "takes adapters.*--lora-rank"),
        ("plugin", dict(kv="native"), "trt_plugin dialect, --kv native"),
        ("ort", {}, "the ort dialect"),
        ("layer", dict(kv="native"), "TensorRT parses since 11.0|does not parse"),
    ],
)
def test_what_does_not_fit(exports: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(exports / name, **options)


def test_adapters_have_one_rank(exports: Path) -> None:
    planned = plan(exports / "lora", lora_rank=8)
    ranges = {name: shapes for name, shapes in planned.profiles[1].items() if name.startswith("lora_")}
    assert len(ranges) == 4 and all(least == most and 8 in most for least, _, most in ranges.values())


@pytest.mark.parametrize("options", [dict(level=6), dict(workspace_mb=0)])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is (6|0 MB)"):
        Options(**options)
