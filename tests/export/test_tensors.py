"""Linears as the exporter asks for them: parts side by side, whatever their groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import formats
from formats import Rounded, gptq_config, rounded, save_quantized
from orin_kit.errors import UnsupportedModelError
from orin_kit.export.tensors import DecoderTensors, Linear
from orin_kit.models.checkpoint import Checkpoint

QKV = tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")


def save(directory: Path, *, ordered: bool = True, **value: Any) -> Checkpoint:
    """A GPTQ checkpoint whose v_proj is rounded otherwise: `bits`, `size`, `symmetric`, `order`."""
    order = np.random.default_rng().permutation(384)

    def round_linear(name: str, weight: NDArray[Any]) -> Rounded:
        how: dict[str, Any] = dict(
            bits=4, size=128, symmetric=True, order=order if ordered and weight.shape[1] == 384 else None
        )
        if name.endswith("v_proj"):
            how |= value
        return rounded(weight, how["bits"], how["size"], symmetric=how["symmetric"], order=how["order"])

    save_quantized(directory, "qwen2", gptq_config(4, 128, desc_act=ordered), round_linear, formats.gptq_tensors)
    return Checkpoint(directory)


def qkv(tensors: DecoderTensors) -> Linear:
    return tensors.linear("qkv", *QKV, out_features=640, in_features=384)


@pytest.mark.parametrize(
    ("value", "size"),
    [({}, 128), ({"symmetric": False}, 128), ({"size": 64}, 64), ({"size": 192}, 64), ({"size": 384}, 128)],
)
def test_parts_side_by_side(value: dict[str, Any], size: int, tmp_path: Path) -> None:
    ordered = "size" not in value
    tensors = DecoderTensors(save(tmp_path, ordered=ordered, **value))
    linear = qkv(tensors)
    packed = tensors.packed(linear)
    assert (linear.bits, linear.group_size, linear.has_order, linear.bias) == (4, size, ordered, True)
    assert packed.group_size == size and packed.shape == (640, 384)
    assert linear.has_zero_points == (packed.zero_points is not None) == (value == {"symmetric": False})
    np.testing.assert_array_equal(packed.dense(), tensors.dense(linear))
    assert tensors.packed(linear) is packed
    plain = qkv(DecoderTensors(tensors.checkpoint, dequantize=True))
    assert (plain.bits, plain.group_size, plain.has_zero_points, plain.has_order) == (None, None, False, False)


def test_parts_of_different_bits_or_order(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="different ways: use --precision fp32"):
        qkv(DecoderTensors(save(tmp_path / "bits", bits=8)))
    tensors = DecoderTensors(save(tmp_path / "order", order=None))
    with pytest.raises(UnsupportedModelError, match="differently.*: use --precision fp32"):
        tensors.packed(qkv(tensors))
    np.testing.assert_array_equal(tensors.dense(qkv(tensors))[:384], tensors.checkpoint.float32(f"{QKV[0]}.weight"))
