"""A convolutional student through the whole chain: distil, quantize, export, run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orin_kit.distill import Recipe, distill
from orin_kit.distill.pair import load_model
from orin_kit.errors import UserError
from orin_kit.export.export import export
from orin_kit.quantize.quantize import quantize
from orin_kit.runtime.runtime import open_runtime

DEMO_CONV = Path(__file__).parents[2] / "calibration/demo-conv"
DATA = {"tasks": {"count": 40}, "row_length": 64, "packing": False}
STAGES = {
    "features": {"steps": 3, "layers": [0, 1], "learning_rate": 1e-3},
    "attention": None,
    "task": {"steps": 3, "learning_rate": 1e-3, "lora": {"r": 4, "targets": ["in_proj", "out_proj"]}},
}


@pytest.fixture
def conv(tmp_path: Path) -> Path:
    student = tmp_path / "conv"
    student.mkdir()
    config = json.loads((DEMO_CONV / "config.json").read_text())
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "layer_types": ["conv"] * 2}
    (student / "config.json").write_text(json.dumps(config | small))
    return student


def test_the_whole_chain(make_recipe: Callable[..., Recipe], conv: Path, tmp_path: Path) -> None:
    recipe = make_recipe(student=str(conv), data=DATA, stages=STAGES)
    distill(recipe, tmp_path / "student", progress=False)
    quantize(tmp_path / "student", tmp_path / "int4", group_size=64, samples=4, perplexity=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 40))
    with torch.no_grad():
        model = load_model(tmp_path / "student").eval()
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    for name, tolerance in (("student", 1e-3), ("int4", None)):
        export(tmp_path / name, tmp_path / f"{name}-onnx", max_len=64, progress=False)
        backend = open_runtime(tmp_path / f"{name}-onnx", max_len=64).backend
        found = backend.score(ids)
        assert np.isfinite(found).all()
        if tolerance:
            np.testing.assert_allclose(found, expected, atol=tolerance)
        else:
            assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9


def test_what_it_cannot_do_is_said(make_recipe: Callable[..., Recipe], conv: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.attention: .* convolutional model"):
        distill(make_recipe(student=str(conv), data=DATA), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"data\.packing: .* chat before in its row"):
        recipe = make_recipe(student=str(conv), data=DATA | {"packing": True}, stages=STAGES)
        distill(recipe, tmp_path / "out", progress=False)
    shutil.rmtree(conv)
