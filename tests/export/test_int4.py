"""INT4 exports against transformers with the weights that were stored: quantize, export, run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from transformers import PreTrainedModel

from families import first_step, save_model
from orin_kit.export.export import export
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.quantize.quantize import quantize
from orin_kit.runtime.runtime import open_runtime

GROUP = 64


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama-biased-linear", "conv"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A model whose weights are the INT4 checkpoint's, and the folder of that checkpoint, `int4`."""
    home = tmp_path_factory.mktemp(request.param)
    model = save_model(home / "hf", request.param)
    quantize(home / "hf", home / "int4", method="rtn", group_size=GROUP, perplexity=False, embedding_bits=8)
    checkpoint = Checkpoint(home / "int4")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer the embedding
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.from_numpy(checkpoint.packed(name).dense()))
        for name, parameter in model.named_parameters():
            if parameter.ndim != 2 or "embed" in name:  # stored in fp16
                parameter.copy_(parameter.half().float())
    return model, home


def expected_logits(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def far(got: np.ndarray, expected: np.ndarray) -> float:
    """The root mean square error, relative to the logits' own spread."""
    return float(np.sqrt(np.mean((got - expected) ** 2)) / expected.std())


def test_reference_dialect_is_exact(quantized: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, home = quantized
    export(home / "int4", tmp_path / "ref", dialect="reference", embedding_bits=16, max_len=64, progress=False)
    evaluator = ReferenceEvaluator(str(tmp_path / "ref/model.onnx"))
    ids = np.random.default_rng().integers(0, 2048, (1, 9))
    logits = evaluator.run(None, first_step(evaluator, ids, np.array([9])))[0]
    assert np.abs(logits - expected_logits(model, ids)).max() <= 1e-3


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 0.08), (8, 0.08), (4, 0.5)])
def test_ort_dialect(quantized: tuple[PreTrainedModel, Path], tmp_path: Path, bits: int, tolerance: float) -> None:
    """Within what int8 activations (accuracy level 4) cost, and a 4-bit embedding where asked for."""
    model, home = quantized
    export(home / "int4", tmp_path / "onnx", embedding_bits=bits, progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 40))
    backend = open_runtime(tmp_path / "onnx", max_len=64).backend
    error = far(backend.score(ids)[0], expected_logits(model, ids)[0])
    assert error < tolerance, error


def test_dequantized_export_is_exact(quantized: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, home = quantized
    export(home / "int4", tmp_path / "fp32", precision="fp32", progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 20))
    got = open_runtime(tmp_path / "fp32", max_len=64).backend.score(ids)
    assert np.abs(got - expected_logits(model, ids)).max() <= 1e-3


def test_the_embedding_bits_that_quantize_was_told_are_used(
    quantized: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, home = quantized
    export(home / "int4", tmp_path / "onnx", progress=False)
    graph = onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False).graph
    gather = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    assert {a.name: a.i for a in gather.attribute}["bits"] == 8
    mixer = "CausalConvWithState" if model.config.model_type == "lfm2" else "GroupQueryAttention"
    assert {node.op_type for node in graph.node} >= {"MatMulNBits", mixer}
