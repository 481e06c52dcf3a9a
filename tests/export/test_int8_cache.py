"""The int8 KV cache against transformers with a cache that rounds what it stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel

from families import first_step
from formats import compressed_config, compressed_tensors, rounded, save_quantized
from orin_kit.errors import UserError
from orin_kit.export.export import export
from orin_kit.runtime.runtime import open_runtime

HEADS, HEAD_DIM, LAYERS = 2, 64, 3


def save(directory: Path, family: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """An int8 checkpoint with the scales of its KV cache, one a channel."""
    config = compressed_config(8, 32, symmetric=True)
    config["kv_cache_scheme"] = dict(num_bits=8, type="int", symmetric=True, dynamic=False, strategy="tensor")
    round_linear = lambda _, weight: rounded(weight, 8, 32, symmetric=True, order=None)  # noqa: E731
    tensors = lambda name, weight: compressed_tensors(name, weight, symmetric=True)  # noqa: E731
    model = save_quantized(directory, family, config, round_linear, tensors)
    names = [f"model.layers.{n}.self_attn.{part}_scale" for n in range(LAYERS) for part in "kv"]
    scales = {name: torch.empty(HEADS, 1, HEAD_DIM).uniform_(0.05, 0.15) for name in names}
    file = directory / "model.safetensors"
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    return model, scales


class RoundingCache(DynamicCache):
    """Keys (after RoPE) and values as int8 would hold them."""

    def __init__(self, scales: dict[str, torch.Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.scales = scales

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        name = f"model.layers.{layer}.self_attn"
        key, value = (
            torch.clip(torch.round(x / s), -128, 127) * s
            for x, s in ((key, self.scales[f"{name}.k_scale"]), (value, self.scales[f"{name}.v_scale"]))
        )
        return super().update(key, value, layer, *rest, **more)


def logits(model: PreTrainedModel, ids: np.ndarray, cache: DynamicCache | None = None) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids), past_key_values=cache, use_cache=cache is not None).logits.numpy()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_prefill_pieces_and_decode(family: str, tmp_path: Path) -> None:
    model, scales = save(tmp_path / "hf", family)
    export(tmp_path / "hf", tmp_path / "onnx", accuracy_level=0, progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 40))
    expected = logits(model, ids, RoundingCache(scales, config=model.config))[0]
    backend = open_runtime(tmp_path / "onnx", max_len=48, threads=1).backend
    got = {19: backend.prefill([ids[0, :20].tolist()])[0], 35: backend.prefill([ids[0, 20:36].tolist()])[0]}
    for at in range(36, 40):
        got[at] = backend.decode(ids[:, at])[0]
    # A sum that lands on the other side of a rounding edge moves a cached value by a whole step, and logits with it.
    errors = [float(np.sqrt(np.mean((row - expected[at]) ** 2)) / expected.std()) for at, row in got.items()]
    lost = float(np.sqrt(np.mean((expected - logits(model, ids)[0]) ** 2)) / expected.std())
    assert max(errors) < 0.02 < 2 * lost, (errors, lost)
    assert backend.memory()["kv_cache"] == 2 * LAYERS * HEADS * 48 * HEAD_DIM

    rows = [ids[0, :n].tolist() for n in (7, 30, 12)]
    backend.reset(3)
    ragged = backend.prefill(rows)
    for row, tokens in enumerate(rows):
        assert np.sqrt(np.mean((ragged[row] - expected[len(tokens) - 1]) ** 2)) < 0.02 * expected.std()


def test_fp16_activations(tmp_path: Path) -> None:
    model, scales = save(tmp_path / "hf", "qwen2")
    export(tmp_path / "hf", tmp_path / "onnx", activations="fp16", progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 30))
    expected = logits(model, ids, RoundingCache(scales, config=model.config))
    got = open_runtime(tmp_path / "onnx", max_len=48, threads=1).backend.score(ids)
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.08 * expected.std()


def test_reference_dialect(tmp_path: Path) -> None:
    model, scales = save(tmp_path / "hf", "qwen3")
    export(tmp_path / "hf", tmp_path / "ref", precision="fp32", dialect="reference", max_len=64, progress=False)
    evaluator = ReferenceEvaluator(str(tmp_path / "ref/model.onnx"))
    ids = np.random.default_rng().integers(0, 2048, (1, 12))
    feed = first_step(evaluator, ids, np.array([12]))
    feed = {n: v.astype(np.int8) if n.startswith("past_key_values") else v for n, v in feed.items()}
    got = evaluator.run(None, feed)[0]
    expected = logits(model, ids, RoundingCache(scales, config=model.config))
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.02 * expected.std()


def test_kv_bits_choose(tmp_path: Path) -> None:
    model, scales = save(tmp_path / "hf", "qwen2")
    export(tmp_path / "hf", tmp_path / "onnx", kv_bits=16, accuracy_level=0, progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 20))
    backend = open_runtime(tmp_path / "onnx", max_len=48, threads=1).backend
    assert np.abs(backend.score(ids) - logits(model, ids)).max() <= 1e-3
    assert backend.memory()["kv_cache"] == 4 * 2 * LAYERS * HEADS * 48 * HEAD_DIM
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    file = tmp_path / "hf/model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n not in scales}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds no scales for an int8 KV cache"):
        export(tmp_path / "hf", tmp_path / "none", kv_bits=8, progress=False)
