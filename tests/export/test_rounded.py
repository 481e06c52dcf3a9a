"""A plain checkpoint exported to INT4 at once, against the two commands that keep the INT4 checkpoint in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.numpy_helper import to_array

from families import save_model
from orin_kit.errors import UserError
from orin_kit.export.export import export
from orin_kit.manifest import read_manifest
from orin_kit.quantize.quantize import quantize
from orin_kit.runtime.runtime import open_runtime


def packed(directory: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(directory / "model.onnx").graph
    return {tensor.name: to_array(tensor) for tensor in graph.initializer if "weight_" in tensor.name}


@pytest.mark.parametrize(("name", "group_size"), [("qwen2", 128), ("llama3", 32), ("conv", 64)])
def test_equals_quantize_rtn_and_export(name: str, group_size: int, tmp_path: Path) -> None:
    save_model(tmp_path / "hf", name, num_hidden_layers=2)
    exact = dict(accuracy_level=0, progress=False)  # else activations are rounded too, and hide what differs
    export(tmp_path / "hf", tmp_path / "once", precision="int4", group_size=group_size, **exact)
    options = dict(method="rtn", group_size=group_size, perplexity=False, embedding_bits=4)
    quantize(tmp_path / "hf", tmp_path / "int4", **options)
    export(tmp_path / "int4", tmp_path / "twice", **exact)
    once, twice = packed(tmp_path / "once"), packed(tmp_path / "twice")
    assert once.keys() == twice.keys() and len(once) > 8
    for key, tensor in once.items():
        if "embed" not in key:  # `quantize` keeps the table in fp16, here it is rounded from what is stored
            np.testing.assert_array_equal(tensor, twice[key], err_msg=key)
    ids = np.random.default_rng().integers(0, 2048, (1, 20))
    first, second = (open_runtime(tmp_path / way, max_len=32).backend.score(ids) for way in ("once", "twice"))
    # Rounded from fp16 or from fp32, a few of the table's codes differ by one.
    assert np.sqrt(np.mean((first - second) ** 2)) < 0.1 * first.std()
    assert read_manifest(tmp_path / "once").settings["method"] == "rtn"


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen2", num_hidden_layers=1, hidden_size=320, intermediate_size=640)
    with pytest.raises(UserError, match="320 input features, which groups of 128 do not divide"):
        export(tmp_path / "hf", tmp_path / "onnx", precision="int4", progress=False)
    with pytest.raises(UserError, match="group size is for rounding"):
        export(tmp_path / "hf", tmp_path / "onnx", group_size=64, progress=False)
    quantize(tmp_path / "hf", tmp_path / "int4", method="rtn", group_size=64, perplexity=False)
    with pytest.raises(UserError, match="group size is for rounding"):
        export(tmp_path / "int4", tmp_path / "onnx", group_size=64, progress=False)
    assert not (tmp_path / "onnx").exists()
