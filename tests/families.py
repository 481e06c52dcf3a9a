"""Tiny random-weight models of every supported family, made by transformers itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orin_kit.tokenizer import TOKENIZER_FILES

DEMO_TEACHER = Path(__file__).parents[1] / "calibration/demo-teacher"

# head_dim 64, 6 query heads on 2 key-value heads as in Qwen2.5-1.5B's 12 on 2; sizes divisible by group 128.
COMMON: dict[str, Any] = dict(
    vocab_size=2048,
    hidden_size=384,
    intermediate_size=640,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2-untied-yarn": dict(model_type="qwen2", tie_word_embeddings=False, rope_parameters=YARN),
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=True),
    "llama3": dict(model_type="llama", tie_word_embeddings=False, rope_parameters=LLAMA3),
    "llama-biased-linear": dict(model_type="llama", attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
    "mistral": dict(model_type="mistral", tie_word_embeddings=False, sliding_window=None),
    # No layer attends, and without one transformers' cache cannot tell its length: use_cache is off.
    "conv": dict(model_type="lfm2", conv_L_cache=24, full_attn_idxs=[], use_cache=False),
    "conv-biased-untied": dict(
        model_type="lfm2",
        conv_L_cache=3,
        full_attn_idxs=[],
        use_cache=False,
        conv_bias=True,
        tie_word_embeddings=False,
        block_auto_adjust_ff_dim=False,
    ),
}


def make_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model whose logits are far from uniform and whose biases and norms are not trivial."""
    fields = COMMON | FAMILIES[name] | changes
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn_like(parameter) * 0.2
                parameter.copy_(noise if key.endswith("bias") else 1 + noise)
            else:
                parameter.mul_(3.0)
    return model.eval()


def save_model(directory: Path, name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Save such a model with the demo tokenizer."""
    model = make_model(name, seed, **changes)
    model.save_pretrained(directory)
    for file in TOKENIZER_FILES:
        shutil.copy(DEMO_TEACHER / file, directory / file) if (DEMO_TEACHER / file).is_file() else None
    return model


def first_step(evaluator: ReferenceEvaluator, ids: NDArray[Any], lengths: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What a graph of fp32 activations is fed to prefill rows `ids` `[batch, sequence]` of these lengths.

    The caches hold 16 tokens; the logits are asked for at every position.
    """
    sizes = {"batch": len(ids), "max_len": 16}
    feed = {
        "input_ids": ids,
        "past_lengths": np.zeros(len(ids), np.int64),
        "logit_positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        "input_lengths": lengths,
    }
    for value in evaluator.proto_.graph.input:
        if value.name.startswith("past_") and value.name != "past_lengths":
            dims = [sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
            feed[value.name] = np.zeros(dims, np.float32)
    return {name: feed[name] for name in evaluator.input_names}
