"""What we write as compressed-tensors, against compressed-tensors' own reading of it and transformers' loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.initialize import initialize_qparams
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from families import make_model, save_model
from orin_kit.errors import ArtifactError
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.compressed_tensors import CompressedTensors, WeightScheme
from orin_kit.models.packing import PackedWeight, pack
from orin_kit.quantize.compressed import kv_scale_tensors, packed_entries, packed_tensors, quantization_config

SCHEMES = [
    WeightScheme(bits, size, symmetric)
    for bits in (4, 8)
    for size in (32, 64, 128, None)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_config_reads_as_written_and_compressed_tensors_agrees(scheme: WeightScheme) -> None:
    config = quantization_config(scheme, ignored=["lm_head"], kv_strategy="tensor")
    assert CompressedTensors.from_config(config) == CompressedTensors((scheme,), kv_bits=8)
    theirs = QuantizationConfig.model_validate(config)
    weights = theirs.config_groups["group_0"].weights
    assert (weights.num_bits, weights.type, weights.symmetric) == (scheme.bits, "int", scheme.symmetric)
    assert weights.group_size == scheme.group_size and theirs.ignore == ["lm_head"]
    # What compressed-tensors itself writes for such a scheme is read as well.
    assert CompressedTensors.from_config(theirs.model_dump()) == CompressedTensors((scheme,), kv_bits=8)


def random_weight(scheme: WeightScheme, rows: int, columns: int) -> PackedWeight:
    rng = np.random.default_rng()
    codes = rng.integers(0, 1 << scheme.bits, (rows, columns), dtype=np.uint8)
    scales = rng.uniform(0.5, 1, (rows, columns // (scheme.group_size or columns))) / (4 << scheme.bits)
    zero_points = rng.integers(0, 1 << scheme.bits, scales.shape, dtype=np.uint8)
    zero_points = None if scheme.symmetric else zero_points
    return PackedWeight(scheme.bits, pack(codes, scheme.bits), scales.astype(np.float16), zero_points)


def write(
    directory: Path, scheme: WeightScheme, others: dict[str, WeightScheme] | None = None, kv_strategy: str | None = None
) -> dict[str, PackedWeight]:
    """A checkpoint with random packed linears, the head among them, and their weights."""
    model = save_model(directory, "qwen2-untied-yarn", num_hidden_layers=2)
    state = {name: array.astype(np.float16) for name, array in load_file(directory / "model.safetensors").items()}
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            how = (others or {}).get(name, scheme)
            weight = weights[name] = random_weight(how, *module.weight.shape)
            tensors = packed_tensors(name, weight, symmetric=how.symmetric)
            assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == packed_entries(name, module.weight.shape, how)
            del state[f"{name}.weight"]
            state |= tensors
    if kv_strategy is not None:
        for layer in range(2):
            state |= kv_scale_tensors(layer, *np.array([[0.5, 0.25], [0.125, 1]], np.float32), kv_strategy)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = quantization_config(scheme, others=others, kv_strategy=kv_strategy)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16", "quantization_config": config}))
    return weights


def load(directory: Path, dequantize: bool) -> Any:
    config = CompressedTensorsConfig(dequantize=dequantize)
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=config, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.group_size != 64])
def test_transformers_loads_the_weights(scheme: WeightScheme, tmp_path: Path) -> None:
    weights = write(tmp_path, scheme)
    model = load(tmp_path, dequantize=True)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check_complete()
    for name, weight in weights.items():
        theirs = model.get_submodule(name).weight.detach().numpy()
        np.testing.assert_array_equal(theirs, weight.dense().astype(np.float16))  # as transformers rounds them
        np.testing.assert_array_equal(checkpoint.float32(f"{name}.weight"), weight.dense())


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_runs_two_schemes_as_stored(bits: int, tmp_path: Path) -> None:
    """Kept compressed: when it dequantizes, transformers 5.24 takes the first scheme for all."""
    head = WeightScheme(12 - bits, 32)
    weights = write(tmp_path, WeightScheme(bits, 64), {"lm_head": head})
    stored = load(tmp_path, dequantize=False)
    plain = make_model("qwen2-untied-yarn", num_hidden_layers=2)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            linear = name.removesuffix(".weight")
            value = torch.from_numpy(weights[linear].dense()) if linear in weights else parameter.half().float()
            parameter.copy_(value)
        ids = torch.randint(0, 2048, (1, 12))
        expected = plain(ids).logits
        assert (stored(ids).logits - expected).abs().max() <= 5e-3 * expected.abs().max()
    np.testing.assert_array_equal(Checkpoint(tmp_path).float32("lm_head.weight"), weights["lm_head"].dense())
    assert Checkpoint(tmp_path).packed("lm_head").bits == head.bits


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_kv_scales_are_those_of_compressed_tensors(strategy: str, tmp_path: Path) -> None:
    """transformers 5.24 loads such a checkpoint and leaves the scales out; vLLM and we read them."""
    write(tmp_path, WeightScheme(), kv_strategy=strategy)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check_complete()
    scales = checkpoint.kv_scales(1)
    assert scales is not None
    expected = [[0.5, 0.25], [0.125, 1]] if strategy == "attn_head" else [[0.5, 0.5], [1, 1]]
    for found, heads in zip(scales, expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.repeat(np.array(heads)[:, None], 64, 1))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    args, theirs = QuantizationConfig.model_validate(config).kv_cache_scheme, torch.nn.Module()
    initialize_qparams(theirs, "k", args, observed_shape=(2, None, 64), observed_dtype=torch.float16)
    assert theirs.k_scale.shape == checkpoint.source.shape("model.layers.1.self_attn.k_scale")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scale: None, "no tensor model.layers.1.self_attn.v_scale"),
        (lambda scale: np.ones(3, np.float16), r"v_scale is \[3\] for 2 heads of 64"),
        (lambda scale: -scale, "v_scale has scales that are not positive"),
        (lambda scale: scale * np.float16(np.nan), "v_scale has scales that are not positive"),
    ],
)
def test_broken_kv_scales_are_named(change: Any, said: str, tmp_path: Path) -> None:
    write(tmp_path, WeightScheme(), kv_strategy="tensor")
    name = "model.layers.1.self_attn.v_scale"
    state = load_file(tmp_path / "model.safetensors")
    changed = change(state.pop(name))
    save_file(state if changed is None else state | {name: changed}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=said):
        Checkpoint(tmp_path).check_complete()


def test_without_kv_scales(tmp_path: Path) -> None:
    write(tmp_path, WeightScheme())
    assert Checkpoint(tmp_path).kv_scales(0) is None


def test_what_the_scheme_does_not_store_is_not_dropped() -> None:
    with pytest.raises(ValueError, match="zero points"):
        packed_tensors("up", random_weight(WeightScheme(symmetric=False), 8, 128))
