"""What a quantizer's tensors stand for, as a state that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from orin_kit.models.packing import PackedWeight
from orin_kit.quantize.sections import Quantized


def dequantized(parts: Iterator[Quantized], bits: int = 4) -> dict[str, torch.Tensor]:
    """Symmetric weights back to fp32, the rest as it is."""
    state = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name.endswith("weight_packed"):
                base = name.removesuffix("_packed")
                state[base] = torch.from_numpy(PackedWeight(bits, tensor, part.tensors[f"{base}_scale"]).dense())
            elif not name.endswith(("weight_scale", "weight_shape")):
                state[name] = torch.from_numpy(np.array(tensor, np.float32))
    return state
