"""Streaming weights: equal to what safetensors wrote, and every kind of broken file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families import make_model
from orin_kit.errors import ArtifactError
from orin_kit.models.weights import WeightSource


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sharded_checkpoint_equals_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model("qwen3").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    source = WeightSource(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for name, tensor in model.state_dict().items():
        if name in source:  # a tied head is stored once
            assert torch.equal(torch.from_numpy(source.float32(name)), tensor.float())
    assert "model.norm.weight" in source


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({"a": torch.randn(64, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, whole / "model.safetensors")
    data = (whole / "model.safetensors").read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    for size in [0, 4, 8, 20, len(data) // 2, len(data) - 1]:
        (cut / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"cut short|broken header"):
            WeightSource(cut)


def test_garbage_missing_shards_and_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no model\.safetensors"):
        WeightSource(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((40).to_bytes(8, "little") + b"x" * 200)
    with pytest.raises(ArtifactError, match="broken header"):
        WeightSource(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="no tensor b"):
        WeightSource(tmp_path).get("b")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ArtifactError, match=r"lacks its shard model-1"):
        WeightSource(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(ArtifactError, match="lacks its shard"):
        WeightSource(tmp_path)
