"""DecoderSpec from configs of every family, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from families import COMMON, FAMILIES, make_model
from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.spec import read_spec, spec_from_config

# The fields of Qwen/Qwen2.5-1.5B's config.json.
QWEN25_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_count_equals_the_real_model(name: str) -> None:
    model = make_model(name)
    spec = spec_from_config(model.config.to_dict())
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())


def test_qwen25_1_5b() -> None:
    spec = spec_from_config(QWEN25_1_5B)
    assert spec.num_parameters == 1_543_714_304  # the model card's 1.54 B
    assert (spec.head_dim, spec.q_size, spec.kv_size) == (128, 1536, 256)
    assert spec.qkv_bias
    assert spec.tie_word_embeddings
    assert spec.rope.theta == 1e6
    assert spec.kv_bytes_per_token(2) == 28672


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window"),
        ({"num_key_value_heads": 5}, "5 key-value heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"layer_types": ["sliding_attention"] * 28}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_is_not_built_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_from_config(QWEN25_1_5B | change)


LFM2: dict[str, Any] = COMMON | {"model_type": "lfm2", "layer_types": ["conv"] * 3, "norm_eps": 1e-5}


@pytest.mark.parametrize(
    "change",
    [
        {"intermediate_size": 641},
        {"block_multiple_of": 7},
        {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 32},
        {"block_auto_adjust_ff_dim": False},
        {"block_ff_dim": 777},
        {"conv_L_cache": 2, "conv_bias": True, "tie_embedding": False},
    ],
)
def test_the_parts_of_lfm2_are_as_large_as_those_of_transformers(change: dict[str, Any]) -> None:
    """Its MLP's width is worked out, and older configs have other names for some fields."""
    config = AutoConfig.for_model(**(LFM2 | change))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    spec = spec_from_config(LFM2 | change)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    shapes = {name: tuple(p.shape) for name, p in model.model.layers[1].named_parameters()}
    assert shapes == spec.plain_shapes() | {f"{name}.weight": shape for name, shape in spec.linear_shapes().items()}
    assert spec.kv_bytes_per_token(4) == 0
    assert spec.conv_state_bytes(2) == 2 * 3 * 384 * (config.conv_L_cache - 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["conv", "full_attention", "conv"]}, "layer_types.*hybrids are not supported"),
        ({"layer_types": ["conv"]}, "layer_types"),
        ({"layer_types": None}, "full_attn_idxs = None"),
        ({"layer_types": None, "full_attn_idxs": [2]}, r"full_attn_idxs = \[2\]"),
        ({"conv_L_cache": 0}, "conv_L_cache"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1"),
        ({"block_multiple_of": 0}, "block_multiple_of"),
        ({"block_ffn_dim_multiplier": None}, "block_ffn_dim_multiplier"),
        ({"conv_dim": 384}, "conv_dim.*is not known"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps.*does not belong to lfm2"),
        ({"attention_bias": True}, "attention_bias.*does not belong to lfm2"),
    ],
)
def test_what_is_not_built_of_lfm2_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_from_config(LFM2 | change)


def test_the_layers_of_another_family_are_not_taken_silently() -> None:
    with pytest.raises(UnsupportedModelError, match="conv_L_cache.*does not belong to qwen2"):
        spec_from_config(QWEN25_1_5B | {"conv_L_cache": 3})


def test_missing_and_broken_configs(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        read_spec(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no config.json"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ArtifactError, match="not a JSON object"):
        read_spec(tmp_path)
