"""Files written tensor by tensor, read by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from orin_kit.errors import UserError
from orin_kit.models.weights import WeightSource
from orin_kit.quantize.tensor_files import TensorFiles


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    return {
        "odd": rng.standard_normal(3).astype(np.float16),
        "packed": rng.integers(-(2**31), 2**31, (5, 7), dtype=np.int32),
        "shape": np.array([5, 56], np.int64),
        "large": rng.standard_normal((3000, 3001)).astype(np.float16),  # more than one piece
    }


@pytest.mark.parametrize("limit", [1 << 30, 1000])
def test_safetensors_reads_what_was_put_in_any_order(tmp_path: Path, limit: int) -> None:
    data = tensors()
    plan = {name: (t.dtype, t.shape) for name, t in data.items()}
    with TensorFiles(tmp_path, plan, shard_bytes=limit) as files:
        for name in reversed(data):
            files.put(name, data[name].astype(np.float64) if data[name].dtype == np.float16 else data[name])
    read: dict[str, np.ndarray] = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        read |= load_file(path)
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}  # transformers refuses files without
    source = WeightSource(tmp_path)
    for name, expected in data.items():
        np.testing.assert_array_equal(read[name], expected)
        np.testing.assert_array_equal(source.get(name), expected)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (limit == 1000)
    if index.exists():
        total = sum(t.nbytes for t in data.values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total


def test_values_beyond_fp16_are_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="norm.*beyond the range of float16"),
        TensorFiles(tmp_path, {"norm": (np.float16, (2,))}) as files,
    ):
        files.put("norm", np.array([1.0, 1e6]))


def test_a_tensor_never_put_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never written"), TensorFiles(tmp_path, {"norm": (np.float16, (2,))}):
        pass
