"""TensorRT's dialects where they differ from the others: fused pairs, tables, int8 caches, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from families import first_step, save_model
from orin_kit.errors import UserError
from orin_kit.export.export import export
from orin_kit.export.plugin_ops import OPS
from orin_kit.quantize.quantize import quantize
from orin_kit.runtime.runtime import open_runtime

IDS = np.random.default_rng().integers(0, 2048, (1, 12))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in INT4 with one table, and int8 cache scales."""
    home = tmp_path_factory.mktemp("tied")
    save_model(home / "hf", "qwen3", num_hidden_layers=2)
    options: dict[str, Any] = dict(method="rtn", group_size=64, perplexity=False, embedding_bits=4, kv_bits=8)
    quantize(home / "hf", home / "int4", samples=4, sample_length=64, **options)
    return home


def logits(directory: Path, dtype: Any = np.float32) -> np.ndarray:
    evaluator = ReferenceEvaluator(str(directory / "model.onnx"), new_ops=list(OPS))
    feed = first_step(evaluator, IDS, np.array([12]))
    for value in evaluator.proto_.graph.input:
        if value.name.startswith("past_key"):
            feed[value.name] = feed[value.name].astype(
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            )
    return np.asarray(evaluator.run(None, feed)[0], dtype)


def far(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2)) / expected.std())


def op_types(directory: Path) -> set[str]:
    return {node.op_type for node in onnx.load(directory / "model.onnx", load_external_data=False).graph.node}


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_plugins_equal_onnxruntime(tied: Path, tmp_path: Path, kv_bits: int) -> None:
    """fp16 activations, fused gate and up, the embedding from the head's tiles, and both caches."""
    export(tied / "int4", tmp_path / "ort", accuracy_level=0, kv_bits=kv_bits, progress=False)
    expected = open_runtime(tmp_path / "ort", max_len=16, threads=1).backend.score(IDS)
    for activations, tolerance in (("fp32", 0.01), ("fp16", 0.02)):
        out = tmp_path / activations
        export(tied / "int4", out, dialect="trt_plugin", activations=activations, kv_bits=kv_bits, progress=False)
        assert far(logits(out), expected) < tolerance
        assert op_types(out) >= {"KvAttention", "Int4Linear", "SkipRmsNorm", "EmbeddingGather"}
        assert "Split" not in op_types(out)
    names = [
        tensor.name for tensor in onnx.load(tmp_path / "fp16/model.onnx", load_external_data=False).graph.initializer
    ]
    assert "lm_head.weight_tiles" in names and not any("embed" in name for name in names)


@pytest.mark.parametrize(("dialect", "bits"), [("trt_plugin", 8), ("trt_plugin", 4), ("trt_native", 8)])
def test_tables_of_their_own(tied: Path, tmp_path: Path, dialect: str, bits: int) -> None:
    how: dict[str, Any] = dict(embedding_bits=bits, tie=False, kv_bits=16, progress=False)
    export(tied / "int4", tmp_path / "ort", accuracy_level=0, **how)
    expected = open_runtime(tmp_path / "ort", max_len=16, threads=1).backend.score(IDS)
    export(tied / "int4", tmp_path / "trt", dialect=dialect, activations="fp32", **how)
    assert far(logits(tmp_path / "trt"), expected) < 0.01


@pytest.mark.parametrize("kv_update", ["select", "layer"])
def test_native_int8_cache(tied: Path, tmp_path: Path, kv_update: str) -> None:
    how: dict[str, Any] = dict(embedding_bits=16, kv_bits=8, activations="fp32", tie=False, progress=False)
    export(tied / "int4", tmp_path / "ref", dialect="reference", **how)
    export(tied / "int4", tmp_path / "trt", dialect="trt_native", kv_update=kv_update, **how)
    assert far(logits(tmp_path / "trt"), logits(tmp_path / "ref")) < 0.01
    assert ("TRT_KVCacheUpdate" in op_types(tmp_path / "trt")) == (kv_update == "layer")


def test_adapters_keep_gate_and_up_apart(tied: Path, tmp_path: Path) -> None:
    export(tied / "int4", tmp_path / "o", dialect="trt_plugin", lora_targets=["gate_proj"], progress=False)
    assert "Split" in op_types(tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dialect="trt_plugin", activations="bf16"), "no bf16 kernels.*--activations fp16"),
        (dict(dialect="trt_native", embedding_bits=4), "do not gather INT4 rows.*--embedding-bits 8"),
        (dict(dialect="trt_native", tie=True), "two tables.*leave out --tie"),
        (dict(dialect="tensorrt"), "'tensorrt' is not known.*trt_plugin"),
        (dict(dialect="trt_native", kv_update="ring"), "'ring' is not known.*select, layer"),
    ],
)
def test_what_does_not_fit_is_said(tied: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(tied / "int4", tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_weights_that_the_kernels_do_not_read(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "llama3", num_hidden_layers=1)
    quantize(tmp_path / "hf", tmp_path / "asym", method="rtn", symmetric=False, group_size=64, perplexity=False)
    for dialect in ("trt_plugin", "trt_native"):
        with pytest.raises(UserError, match="packed in a way"):
            export(tmp_path / "asym", tmp_path / "out", dialect=dialect, embedding_bits=16, progress=False)
    save_model(tmp_path / "odd", "llama3", num_hidden_layers=1, hidden_size=192)
    with pytest.raises(UserError, match="multiples of 8 and 128.*trt_native"):
        export(
            tmp_path / "odd", tmp_path / "out", precision="int4", group_size=64, dialect="trt_plugin", progress=False
        )
    save_model(tmp_path / "small", "llama3", num_hidden_layers=1, head_dim=32)
    with pytest.raises(UserError, match="head_dim 32 has no attention kernel"):
        export(tmp_path / "small", tmp_path / "out", dialect="trt_plugin", progress=False)
