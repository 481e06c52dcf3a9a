"""Quantized checkpoints as others write them, packed here in plain loops by each format's own definition.

AutoAWQ: awq/modules/linear/gemm.py `from_linear`. GPTQ: the `pack` of AutoGPTQ's and GPTQModel's qlinear modules.
compressed-tensors packs by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from families import save_model


@dataclass
class Rounded:
    """A weight `[out, in]` rounded to codes: `w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]`, g = groups[i].

    `scales` are fp16 and `zeros` whole numbers `[out, n]`; without act-order `groups` counts up.
    """

    bits: int
    codes: NDArray[np.int64]
    scales: NDArray[np.float16]
    zeros: NDArray[np.int64]
    groups: NDArray[np.int64]

    def dense(self) -> NDArray[np.float64]:
        return (self.codes - self.zeros[:, self.groups]) * self.scales.astype(np.float64)[:, self.groups]


def rounded(weight: NDArray[Any], bits: int, size: int, *, symmetric: bool, order: NDArray[np.int64] | None) -> Rounded:
    """Round to nearest; `order` names the input features from the first group to the last."""
    rows, columns = weight.shape
    groups = np.empty(columns, np.int64)
    groups[np.arange(columns) if order is None else order] = np.arange(columns) // size
    count, top = columns // size, 2**bits - 1
    scales, zeros = np.empty((rows, count), np.float16), np.empty((rows, count), np.int64)
    for group in range(count):
        part = weight[:, groups == group].astype(np.float64)
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, group] = np.maximum(-low, high) / (top / 2)
            zeros[:, group] = 2 ** (bits - 1)
        else:
            scales[:, group] = (high - low) / top
            zeros[:, group] = np.clip(np.rint(-low / scales[:, group].astype(np.float64)), 1, top)
    codes = np.rint(weight / scales.astype(np.float64)[:, groups]) + zeros[:, groups]
    return Rounded(bits, np.clip(codes, 0, top).astype(np.int64), scales, zeros, groups)


def packed_words(numbers: NDArray[np.int64], bits: int, order: list[int]) -> torch.Tensor:
    """Numbers `[n, m]` -> int32 `[n, m * bits / 32]`: the i-th field of a word is its neighbour number `order[i]`."""
    fields = 32 // bits
    words = np.zeros((len(numbers), numbers.shape[1] // fields), np.uint32)
    for word in range(words.shape[1]):
        for i in range(fields):
            words[:, word] |= numbers[:, word * fields + order[i]].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32).copy())


def awq_tensors(name: str, w: Rounded) -> dict[str, torch.Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        f"{name}.qweight": packed_words(w.codes.T, 4, order),
        f"{name}.qzeros": packed_words(w.zeros.T, 4, order),
        f"{name}.scales": torch.from_numpy(w.scales.T.copy()),
    }


def gptq_tensors(name: str, w: Rounded, *, v2: bool = False) -> dict[str, torch.Tensor]:
    inorder = list(range(32 // w.bits))
    return {
        f"{name}.qweight": packed_words(w.codes, w.bits, inorder).T.contiguous(),
        f"{name}.qzeros": packed_words(w.zeros.T - (0 if v2 else 1), w.bits, inorder),
        f"{name}.scales": torch.from_numpy(w.scales.T.copy()),
        f"{name}.g_idx": torch.from_numpy(w.groups.astype(np.int32)),
    }


def compressed_tensors(name: str, w: Rounded, *, symmetric: bool, g_idx: bool = False) -> dict[str, torch.Tensor]:
    middle = 2 ** (w.bits - 1)
    tensors = {
        f"{name}.weight_packed": pack_to_int32(torch.from_numpy((w.codes - middle).astype(np.int8)), w.bits),
        f"{name}.weight_scale": torch.from_numpy(w.scales),
        f"{name}.weight_shape": torch.tensor(w.codes.shape),
    }
    if not symmetric:
        zeros = torch.from_numpy((w.zeros - middle).astype(np.int8))
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(zeros, w.bits, packed_dim=0).contiguous()
    if g_idx:
        tensors[f"{name}.weight_g_idx"] = torch.from_numpy(w.groups.astype(np.int32))
    return tensors


AWQ: dict[str, Any] = dict(quant_method="awq", bits=4, group_size=128, zero_point=True, version="gemm",
                           modules_to_not_convert=None)  # fmt: skip


def gptq_config(bits: int, size: int, **changes: Any) -> dict[str, Any]:
    """What GPTQModel writes."""
    return dict(
        bits=bits, group_size=size, desc_act=False, sym=True, lm_head=False, quant_method="gptq",
        checkpoint_format="gptq", pack_dtype="int32", meta={"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05},
    ) | changes  # fmt: skip


def compressed_config(bits: int, size: int | None, *, symmetric: bool, **weights: Any) -> dict[str, Any]:
    """What llm-compressor writes."""
    scheme = dict(
        actorder=None, block_structure=None, dynamic=False, group_size=size, num_bits=bits, observer="minmax",
        observer_kwargs={}, strategy="channel" if size is None else "group", symmetric=symmetric, type="int",
    ) | weights  # fmt: skip
    group = dict(input_activations=None, output_activations=None, targets=["Linear"], weights=scheme)
    return dict(
        config_groups={"group_0": group}, format="pack-quantized", global_compression_ratio=None, ignore=["lm_head"],
        kv_cache_scheme=None, quant_method="compressed-tensors", quantization_status="compressed",
    )  # fmt: skip


def save_quantized(
    directory: Path,
    family: str,
    config: dict[str, Any],
    round_linear: Callable[[str, NDArray[Any]], Rounded],
    tensors: Callable[[str, Rounded], dict[str, torch.Tensor]],
    **changes: Any,
) -> PreTrainedModel:
    """Save a random model with its decoder layers' linears quantized, the rest in fp16.

    Returns:
        transformers' model in fp32 with the weights that the checkpoint means.
    """
    model = save_model(directory, family, **changes)
    state = load_file(directory / "model.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                weight = round_linear(name, state.pop(f"{name}.weight").numpy())
                module.weight.copy_(torch.from_numpy(weight.dense()))
                state |= tensors(name, weight)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(half, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16", "quantization_config": config}))
    return model
