"""The quantization config against compressed-tensors' own reading of it; what we refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compressed_tensors.quantization import QuantizationConfig
from safetensors.numpy import save_file

from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.weights import WeightSource
from orin_kit.quantize.compressed import Int4Config, packed_tensors, read_packed
from orin_kit.quantize.int4 import quantize_groups


def test_config_reads_as_written_and_compressed_tensors_agrees() -> None:
    config = Int4Config(64, ("lm_head",))
    assert Int4Config.from_config(config.to_config()) == config
    theirs = QuantizationConfig.model_validate(config.to_config())
    weights = theirs.config_groups["group_0"].weights
    assert (weights.num_bits, weights.type, weights.symmetric, weights.group_size) == (4, "int", True, 64)
    # What compressed-tensors itself writes for such a scheme is read as well.
    assert Int4Config.from_config(theirs.model_dump()) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("quant_method",), "awq"),
        (("format",), "int-quantized"),
        (("kv_cache_scheme",), {"num_bits": 8}),
        (("ignore",), ["re:.*lm_head"]),
        (("config_groups",), {}),
        (("config_groups", "group_0", "targets"), ["re:.*q_proj"]),
        (("config_groups", "group_0", "input_activations"), {"num_bits": 8}),
        (("config_groups", "group_0", "weights", "num_bits"), 8),
        (("config_groups", "group_0", "weights", "symmetric"), False),
        (("config_groups", "group_0", "weights", "strategy"), "channel"),
        (("config_groups", "group_0", "weights", "group_size"), 48),
        (("config_groups", "group_0", "weights", "type"), "float"),
    ],
)
def test_other_schemes_are_refused_by_field(path: tuple[str, ...], value: Any) -> None:
    config = copy.deepcopy(Int4Config(128).to_config())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UnsupportedModelError, match=path[-1]):
        Int4Config.from_config(config)


def write(directory: Path, **changes: Any) -> WeightSource:
    q, scales = quantize_groups(np.random.default_rng().standard_normal((24, 128)).astype(np.float32), 64)
    tensors = packed_tensors("up", q, scales) | {f"up.{name}": value for name, value in changes.items()}
    save_file(tensors, directory / "model.safetensors")
    return WeightSource(directory)


def test_packed_tensors_are_read_back(tmp_path: Path) -> None:
    stored = read_packed(write(tmp_path), "up")
    assert stored.packed.shape == (24, 16) and stored.scales.shape == (24, 2) and stored.scales.dtype == np.float16


def test_shapes_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"up is said to be \[24, 256\]"):
        read_packed(write(tmp_path, weight_shape=np.array([24, 256])), "up")


def test_zero_points_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="weight_zero_point"):
        read_packed(write(tmp_path, weight_zero_point=np.zeros((3, 2), np.int32)), "up")
