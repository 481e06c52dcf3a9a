"""Quantize a checkpoint with llm-compressor: `quantize_peers.py` runs this with the interpreter llm-compressor is in.

It imports nothing of orin-kit. Linears of the decoder layers are quantized in groups, the head stays as it is.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

DUO = {"yes": True, "no": False, "both": "both"}


def recipe(options: argparse.Namespace) -> list[Any]:
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "strategy": "group",
        "group_size": options.group_size,
        "symmetric": not options.asymmetric,
    }
    if options.observer:
        weights["observer"] = options.observer
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rounding = GPTQModifier if options.method == "gptq" else QuantizationModifier
    last = rounding(config_groups=groups, ignore=["lm_head"])
    return [AWQModifier(duo_scaling=DUO[options.duo_scaling]), last] if options.method == "awq" else [last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="token ids `[samples, length]`, .npy")
    parser.add_argument("--out", required=True)
    parser.add_argument("--method", choices=["rtn", "gptq", "awq"], required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--observer", help="of the scales; llm-compressor's default (min-max) when not given")
    parser.add_argument("--duo-scaling", choices=list(DUO), default="both", help="of awq")
    options = parser.parse_args()
    if not torch.accelerator.is_available():
        # 0.14 pins memory whether or not there is a GPU to copy it to, and torch refuses: AWQ would not run at all.
        IntermediatesCache.pin_memory = lambda self, index: None
    rows = np.load(options.rows)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    text = {"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(text),
        recipe=recipe(options),
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        shuffle_calibration_samples=False,
        batch_size=8,
    )
    model.save_pretrained(options.out, save_compressed=True)


if __name__ == "__main__":
    main()
