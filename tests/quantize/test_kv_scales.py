"""Scales of the int8 KV cache against transformers' own cache, and the checkpoints that hold them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache

from families import save_model
from orin_kit.errors import UserError
from orin_kit.manifest import read_manifest
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.quantize.calibrate import read_samples
from orin_kit.quantize.kv_scales import CacheRange, caching, int8_store
from orin_kit.quantize.layerwise import LayerwiseDecoder
from orin_kit.quantize.quantize import quantize
from orin_kit.tokenizer import ChatTokenizer

SMALL: dict[str, Any] = dict(samples=6, sample_length=128)


@torch.no_grad()
def cached_by_transformers(model: Any, rows: NDArray[np.int64]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Largest key and value of each channel that its cache holds after these rows, by layer."""
    cache = DynamicCache(config=model.config)
    model(torch.from_numpy(rows), past_key_values=cache, use_cache=True)
    return [(layer.keys.abs().amax((0, 2)), layer.values.abs().amax((0, 2))) for layer in cache.layers]


@pytest.mark.parametrize("granularity", ["channel", "head", "tensor"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3"])
@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_scales_are_the_quantized_models_largest_keys_and_values(
    name: str, method: str, granularity: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", name, num_hidden_layers=2)
    how: dict[str, Any] = dict(method=method, kv_bits=8, kv_scales=granularity, perplexity=False, lm_head=False)
    quantize(tmp_path / "model", tmp_path / "out", **how, **SMALL)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    rows = read_samples(ChatTokenizer(tmp_path / "model"), None, **SMALL, seed=0, vocab_size=2048).rows
    checkpoint = Checkpoint(tmp_path / "out")
    checkpoint.check_complete()
    over = {"channel": (), "head": (-1,), "tensor": (-2, -1)}[granularity]
    for layer, expected in enumerate(cached_by_transformers(loaded, rows)):
        found = checkpoint.kv_scales(layer)
        assert found is not None
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == np.float32 and mine.shape == (2, 64)
            largest = theirs.amax(over, keepdim=True).expand(2, 64) if over else theirs
            # transformers dequantizes in fp16, and so are the coarser scales stored.
            np.testing.assert_allclose(mine * 127, largest.numpy(), rtol=5e-3)
    settings = read_manifest(tmp_path / "out", "int4").settings
    assert (settings["kv_bits"], settings["kv_scales"]) == (8, granularity)


def test_coarse_scales_are_compressed_tensors_own(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "qwen2", num_hidden_layers=1)
    for granularity, strategy in (("head", QuantizationStrategy.ATTN_HEAD), ("tensor", QuantizationStrategy.TENSOR)):
        out = tmp_path / granularity
        quantize(tmp_path / "model", out, method="rtn", kv_bits=8, kv_scales=granularity, perplexity=False, **SMALL)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        scheme = QuantizationConfig.model_validate(config).kv_cache_scheme
        assert scheme is not None and (scheme.strategy, scheme.num_bits, scheme.symmetric) == (strategy, 8, True)


@torch.no_grad()
def test_an_int8_cache_changes_the_outputs_by_its_rounding(tmp_path: Path) -> None:
    """Against attention in float64 on keys and values rounded in float64."""
    save_model(tmp_path, "qwen3", num_hidden_layers=1)
    decoder = LayerwiseDecoder(Checkpoint(tmp_path))
    layer, hidden = decoder.layer(0), torch.randn(3, 20, 384)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((key, value))
        return key, value

    ranges = CacheRange()
    with caching(note):
        plain = torch.cat([out for _, out in decoder.run(layer, hidden)])
    for key, value in seen:
        ranges.add(key, value)
    key_scale, value_scale = ranges.scales()
    with caching(int8_store(key_scale, value_scale)):
        rounded = torch.cat([out for _, out in decoder.run(layer, hidden)])
    assert 0 < (rounded - plain).square().mean() / plain.square().mean() < 1e-3
    again = torch.cat([out for _, out in decoder.run(layer, hidden)])
    torch.testing.assert_close(again, plain, rtol=0, atol=0)  # nothing is left behind

    key, value = seen[0]
    stored = int8_store(key_scale, value_scale)(key, value)
    for x, scale, mine in ((key, key_scale, stored[0]), (value, value_scale, stored[1])):
        s = scale.astype(np.float64)[:, None]
        codes = np.clip(np.rint(x.double().numpy() / s), -127, 127)
        assert np.abs(codes).max() == 127
        off = np.abs(mine.numpy() - codes * s) / s
        assert (off > 0.01).mean() < 1e-3  # fp32 division may tip a tie


def test_perplexity_is_that_of_the_int8_cache(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "qwen2", num_hidden_layers=2)
    measured = {}
    for kv_bits in (16, 8):
        results = quantize(tmp_path / "model", tmp_path / f"kv{kv_bits}", method="rtn", kv_bits=kv_bits, **SMALL)
        measured[kv_bits] = results["perplexity_after"]
    assert measured[8] != measured[16] and math.isclose(measured[8], measured[16], rel_tol=0.02)


def test_convolutions_have_no_cache(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "conv", num_hidden_layers=1)
    with pytest.raises(UserError, match="no KV cache.*--kv-bits"):
        quantize(tmp_path / "model", tmp_path / "out", kv_bits=8, **SMALL)
