"""What the graph computes for the logits, and what a provider cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from families import save_model
from orin_kit.errors import UserError
from orin_kit.export.export import export
from orin_kit.runtime.runtime import open_runtime


def test_prefill_multiplies_the_head_with_the_last_positions_only(tmp_path: Path) -> None:
    """By onnxruntime's own profile of a prompt of 50 tokens: the head sees one of them."""
    save_model(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    export(tmp_path / "hf", tmp_path / "onnx", precision="int4", progress=False)
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(str(tmp_path / "onnx/model.onnx"), options, providers=["CPUExecutionProvider"])
    cache = np.zeros((1, 2, 64, 64), np.float32)
    session.run(None, {
        "input_ids": np.ones((1, 50), np.int64), "past_lengths": np.zeros(1, np.int64),
        "logit_positions": np.array([[49]]), "past_key_values.0.key": cache, "past_key_values.0.value": cache,
    })  # fmt: skip
    events = json.loads(Path(session.end_profiling()).read_text())
    shapes = [e["args"]["input_type_shape"] for e in events if e["args"].get("op_name") == "MatMulNBits"]
    rows = {scales["float"][0]: x["float"] for x, scales, *_ in shapes}  # out_features -> shape of the input
    assert rows[2048] == [1, 1, 384]
    assert rows[1280] == [1, 50, 384]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_logits_are_fp32(precision: str, tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    export(tmp_path / "hf", tmp_path / "onnx", precision=precision, progress=False)
    graph = onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False).graph
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    logits = open_runtime(tmp_path / "onnx", max_len=32, threads=1).backend.prefill([[1, 2, 3]])
    assert logits.dtype == np.float32 and logits.shape == (1, 2048)


@pytest.mark.parametrize("options", [dict(precision="bf16"), dict(precision="int4", activations="bf16")])
def test_bf16_exports_and_the_cpu_provider_says_that_it_cannot(options: dict[str, str], tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    export(tmp_path / "hf", tmp_path / "onnx", progress=False, **options)
    graph = onnx.load(tmp_path / "onnx/model.onnx").graph
    assert {i.name: i for i in graph.input}["past_key_values.0.key"].type.tensor_type.elem_type == 16
    with pytest.raises(UserError, match="CPUExecutionProvider cannot run .*--activations fp32"):
        open_runtime(tmp_path / "onnx", threads=1)
