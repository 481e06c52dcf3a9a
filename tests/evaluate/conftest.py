"""A random model with the demo tokenizer, in both forms."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from families import save_model
from orin_kit.export.export import export
from orin_kit.runtime.runtime import open_runtime


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """transformers' `model`, and the `runtime` of its export."""
    directory = tmp_path_factory.mktemp("evaluated")
    model = save_model(directory / "hf", "qwen2", num_hidden_layers=2)
    export(directory / "hf", directory / "onnx", progress=False)
    return SimpleNamespace(model=model, onnx=directory / "onnx", runtime=open_runtime(directory / "onnx", threads=1))
