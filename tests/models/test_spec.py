"""DecoderSpec from configs of every family, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES, make_model
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
