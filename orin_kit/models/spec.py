"""DecoderSpec: what a decoder is, read from a Hugging Face `config.json`.

The fields bear the config's own names. Every field of a config is either used, known to change nothing at inference,
or refused: nothing is ignored silently.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.rope import Rope, read_rope

EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"  # as every family names them

# What each family does that its config does not say. Sources: transformers/models/{qwen2,qwen3,llama,mistral}.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm": True},
    "llama": {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias", "qk_norm": False},
    "mistral": {"qkv_bias": False, "qk_norm": False},
}
# Read below.
USED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "quantization_config",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip
# They change training, generation defaults or bookkeeping, not the graph.
HARMLESS = {
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
    "torch_dtype", "dtype", "transformers_version", "use_cache", "pretraining_tp", "_name_or_path", "auto_map",
    "attn_implementation", "_attn_implementation", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "finetuning_task",
    "use_mrope",
}  # fmt: skip


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm, RoPE, gated-MLP decoder, in the config's own field names.

    Attributes:
        qkv_bias, o_bias, mlp_bias: whether those projections carry a bias.
        qk_norm: RMS norm over head_dim on queries and keys, before RoPE (Qwen3).
        rope: rotary frequencies with their scaling.
        tie_word_embeddings: the head is the embedding table.
        quantization_config: the config's own, for checkpoints whose linears are packed; None for plain ones.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    quantization_config: dict[str, Any] | None = None

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The linears of one layer: name below `model.layers.N.` -> `(out_features, in_features)`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.q_size, hidden),
            "self_attn.k_proj": (self.kv_size, hidden),
            "self_attn.v_proj": (self.kv_size, hidden),
            "self_attn.o_proj": (hidden, self.q_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def num_parameters(self) -> int:
        """Weights and biases; a tied table counts once."""
        layer = sum(out * inner for out, inner in self.linear_shapes().values()) + 2 * self.hidden_size
        layer += (self.q_size + 2 * self.kv_size) * self.qkv_bias + self.hidden_size * self.o_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias + 2 * self.head_dim * self.qk_norm
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layer * self.num_hidden_layers + tables + self.hidden_size

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one more token of context costs in the cache, keys and values of all layers."""
        return 2 * self.num_hidden_layers * self.kv_size * bytes_per_value


def read_spec(directory: str | Path) -> DecoderSpec:
    """Read `directory/config.json`.

    Raises:
        ArtifactError: it is missing or not JSON.
        UnsupportedModelError: a family, field or value that orin-kit does not build.
    """
    config = read_config(directory)
    return spec_from_config(config, source=str(Path(directory) / "config.json"))


def read_config(directory: str | Path) -> dict[str, Any]:
    """`directory/config.json` as it is.

    Raises:
        ArtifactError: it is missing or not a JSON object.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise ArtifactError(f"no such directory: {directory}", mend="give a local model directory")
    if not path.is_file():
        raise ArtifactError(f"no config.json in {directory}", mend="give a directory with a Hugging Face model")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}", mend="restore the model's own file") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a JSON object", mend="restore the model's own file")
    return config


def spec_from_config(config: dict[str, Any], source: str = "config.json") -> DecoderSpec:
    """Build a spec from the fields of a config (see `read_spec`)."""
    family = _family(config, source)
    _refuse_unknown(config, source)

    def trait(name: str) -> bool:
        value = family.get(name, False)
        return bool(config.get(value, False)) if isinstance(value, str) else bool(value)

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedModelError(f"{source}: {name} is {value!r}", mend="it must be a positive whole number")
        return value

    heads = size("num_attention_heads")
    spec = DecoderSpec(
        model_type=config["model_type"],
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", size("hidden_size") // heads),
        max_position_embeddings=size("max_position_embeddings"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=read_rope(config, source),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=trait("qkv_bias"),
        o_bias=trait("o_bias"),
        mlp_bias=trait("mlp_bias"),
        qk_norm=trait("qk_norm"),
        quantization_config=config.get("quantization_config"),
    )
    if spec.num_attention_heads % spec.num_key_value_heads:
        what = f"{source}: {heads} attention heads cannot share {spec.num_key_value_heads} key-value heads"
        raise UnsupportedModelError(what, mend="num_attention_heads must be a multiple of num_key_value_heads")
    if spec.head_dim % 2:
        raise UnsupportedModelError(f"{source}: head_dim {spec.head_dim} is odd", mend="RoPE needs an even head_dim")
    return spec


def _family(config: dict[str, Any], source: str) -> dict[str, Any]:
    known = ", ".join(FAMILIES)
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UnsupportedModelError(f"{source}: model_type {name!r} is not supported", mend=f"use one of {known}")
    return FAMILIES[name]


def _refuse_unknown(config: dict[str, Any], source: str) -> None:
    def refuse(field: str, why: str) -> None:
        what = f"{source}: {field} = {config.get(field)!r} {why}"
        raise UnsupportedModelError(what, mend="use a model without it, or ask for it in an issue")

    for field in sorted(set(config) - USED - HARMLESS):
        if config[field] not in (None, False):
            refuse(field, "is not known to orin-kit")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "is not supported (only silu)")
    family = config["model_type"]
    for field, families in (("attention_bias", ("qwen3", "llama")), ("mlp_bias", ("llama",))):
        if config.get(field) and family not in families:
            refuse(field, f"does not belong to {family}")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        refuse("partial_rotary_factor", "is not supported")
    # Mistral has no switch: its window is on whenever it is set.
    switched_on = config.get("use_sliding_window", family == "mistral")
    window = config.get("sliding_window")
    if switched_on and window and window < config.get("max_position_embeddings", 0):
        refuse("sliding_window", "is shorter than the context; sliding windows are not supported")
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        refuse("layer_types", "names layers other than full_attention")
