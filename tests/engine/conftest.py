"""The API tools are scripts; graphs that engines are planned for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from families import save_model
from orin_kit.export.export import export


@pytest.fixture(scope="package")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plugin`, `native`, `layer` (all fp16), `lora`, `ort`, each an ONNX artifact of one small model."""
    home = tmp_path_factory.mktemp("exports")
    save_model(home / "hf", "qwen3", num_hidden_layers=2)
    for name, options in {
        "plugin": dict(dialect="trt_plugin"),
        "native": dict(dialect="trt_native"),
        "layer": dict(dialect="trt_native", kv_update="layer"),
        "lora": dict(dialect="trt_plugin", lora_targets=["q_proj"]),
        "ort": {},
    }.items():
        export(home / "hf", home / name, max_len=256, progress=False, **options)
    save_model(home / "conv-hf", "conv", num_hidden_layers=2)
    export(home / "conv-hf", home / "conv", max_len=256, dialect="trt_plugin", progress=False)
    return home
