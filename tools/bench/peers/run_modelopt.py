"""Quantize a checkpoint with NVIDIA's modelopt: `quantize_peers.py` runs this with the interpreter modelopt is in.

It imports nothing of orin-kit. Linears of the decoder layers become INT4 in groups of 128, symmetric: the only INT4
that modelopt has. What is written is a plain fp32 checkpoint of the values its INT4 export stands for: as in that
export, linears with one input share its scales, and norms take them in. `o_proj` and `down_proj` keep a scale of their
inputs, which a runtime has to multiply by; here it is multiplied into their weights.
"""

from __future__ import annotations

import argparse
import copy

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers
from transformers import AutoModelForCausalLM, PreTrainedModel

METHODS = {"rtn": "max", "awq": "awq_lite", "awq-clip": "awq_full"}


def plain_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of the plain model that computes what the quantized one does."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "_quantizer" not in name}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled:
            continue
        weight = quantizer(module.weight.detach())
        scale = module.input_quantizer.pre_quant_scale
        tensors[f"{name}.weight"] = weight if scale is None else weight * scale.to(weight.dtype)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="token ids `[samples, length]`, .npy")
    parser.add_argument("--out", required=True)
    parser.add_argument("--method", choices=list(METHODS), required=True)
    options = parser.parse_args()
    rows = torch.from_numpy(np.load(options.rows))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    def forward(quantized: PreTrainedModel) -> None:
        with torch.no_grad():
            for batch in rows.split(8):
                quantized(batch)

    config = copy.deepcopy(mtq.INT4_AWQ_CFG if options.method != "rtn" else mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    if options.method == "awq-clip":
        config["algorithm"] = {"method": METHODS[options.method]}
    mtq.quantize(model, config, forward)
    requantize_resmooth_fused_llm_layers(model)
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    plain.load_state_dict(plain_weights(model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(rows[:2]).logits, model(rows[:2]).logits, rtol=1e-3, atol=1e-3)
    plain.save_pretrained(options.out)


if __name__ == "__main__":
    main()
