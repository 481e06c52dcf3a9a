"""DecoderSpec: what a decoder is, read from a Hugging Face `config.json`.

The fields bear the config's own names. Every field of a config is either used, known to change nothing at inference,
or refused: nothing is ignored silently.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.models.families import FAMILIES, Family, Layout
from orin_kit.models.rope import Rope, read_rope

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"  # as every family names them

# Read below, of every family.
USED = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "hidden_act", "quantization_config", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "partial_rotary_factor",
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
MEND = "use a model without it, or ask for it in an issue"


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm, gated-MLP decoder whose mixer is attention with RoPE or a convolution, in the config's field names.

    Attributes:
        layout: what the family calls the parts of a layer, and which mixer it has.
        intermediate_size: of the MLP as it is built (LFM2's configs may say another, see `_mlp_width`).
        num_attention_heads, num_key_value_heads, head_dim, rope: 0 and None without attention.
        conv_kernel_size: LFM2's `conv_L_cache`, the positions that one convolution sees; 0 without convolution.
        qkv_bias, o_bias, mlp_bias: whether those projections carry a bias.
        conv_bias: whether a convolution and the projections around it carry biases.
        qk_norm: RMS norm over head_dim on queries and keys, before RoPE (Qwen3).
        rope: rotary frequencies with their scaling.
        tie_word_embeddings: the head is the embedding table.
        quantization_config: the config's own, for checkpoints whose linears are packed; None for plain ones.
    """

    model_type: str
    layout: Layout
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    conv_bias: bool = False
    conv_kernel_size: int = 0
    quantization_config: dict[str, Any] | None = None

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The linears of one layer: name below `model.layers.N.` -> `(out_features, in_features)`."""
        hidden, inner, layout = self.hidden_size, self.intermediate_size, self.layout
        attends = layout.mixer == "attention"
        mixed = (self.q_size, self.kv_size, self.kv_size) if attends else (3 * hidden,)
        return {
            **{name: (size, hidden) for name, size in zip(layout.mixer_in, mixed, strict=True)},
            layout.mixer_out: (hidden, self.q_size if attends else hidden),
            layout.gate: (inner, hidden),
            layout.up: (inner, hidden),
            layout.down: (hidden, inner),
        }

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """The other tensors of one layer, norms, biases and convolution: name below `model.layers.N.` -> shape."""
        layout = self.layout
        shapes: dict[str, tuple[int, ...]] = {
            f"{norm}.weight": (self.hidden_size,) for norm in (layout.mixer_norm, layout.mlp_norm)
        }
        if self.qk_norm:
            shapes |= {f"self_attn.{norm}.weight": (self.head_dim,) for norm in ("q_norm", "k_norm")}
        if layout.conv is not None:
            shapes[f"{layout.conv}.weight"] = (self.hidden_size, 1, self.conv_kernel_size)
            if self.conv_bias:
                shapes[f"{layout.conv}.bias"] = (self.hidden_size,)
        biased = dict.fromkeys(layout.mixer_in, self.qkv_bias or self.conv_bias)
        biased[layout.mixer_out] = self.o_bias or self.conv_bias
        for name, (rows, _) in self.linear_shapes().items():
            if biased.get(name, self.mlp_bias):
                shapes[f"{name}.bias"] = (rows,)
        return shapes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of an unquantized checkpoint, name -> shape; a tied head is none."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": table}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.{name}.weight": shape for name, shape in self.linear_shapes().items()}
            shapes |= {f"{prefix}.{name}": shape for name, shape in self.plain_shapes().items()}
        shapes[f"{self.layout.norm}.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes[f"{HEAD}.weight"] = table
        return shapes

    @property
    def num_parameters(self) -> int:
        """Weights and biases; a tied table counts once."""
        layer = sum(math.prod(shape) for shape in (*self.linear_shapes().values(), *self.plain_shapes().values()))
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layer * self.num_hidden_layers + tables + self.hidden_size

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one more token of context costs in the cache, keys and values in all; 0 for convolutions."""
        return 2 * self.num_hidden_layers * self.kv_size * bytes_per_value

    def conv_state_bytes(self, bytes_per_value: int) -> int:
        """Bytes of one row's convolution states, the same at any length; 0 for attention."""
        return self.num_hidden_layers * self.hidden_size * max(self.conv_kernel_size - 1, 0) * bytes_per_value


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
    _refuse_other_layers(config, family, source)
    _refuse_unknown(config, family, source)
    renamed = {ours: config[theirs] for theirs, ours in family.aliases.items() if theirs in config}
    config = family.defaults | config | renamed
    convolves = family.layout.mixer == "conv"

    def trait(name: str) -> bool:
        value = family.traits.get(name, False)
        return bool(config.get(value, False)) if isinstance(value, str) else value

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedModelError(f"{source}: {name} is {value!r}", mend="it must be a positive whole number")
        return value

    heads = 0 if convolves else size("num_attention_heads")
    spec = DecoderSpec(
        model_type=config["model_type"],
        layout=family.layout,
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=_mlp_width(config, size("intermediate_size"), source),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=0 if convolves else size("num_key_value_heads", heads),
        head_dim=0 if convolves else size("head_dim", size("hidden_size") // heads),
        max_position_embeddings=size("max_position_embeddings"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=None if convolves else read_rope(config, source),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=trait("qkv_bias"),
        o_bias=trait("o_bias"),
        mlp_bias=trait("mlp_bias"),
        qk_norm=trait("qk_norm"),
        conv_bias=trait("conv_bias"),
        conv_kernel_size=size("conv_L_cache") if convolves else 0,
        quantization_config=config.get("quantization_config"),
    )
    if not convolves:
        _check_heads(spec, source)
    elif spec.conv_kernel_size < 2:
        raise UnsupportedModelError(f"{source}: conv_L_cache is 1", mend="a convolution must see 2 positions or more")
    return spec


def _check_heads(spec: DecoderSpec, source: str) -> None:
    heads, shared = spec.num_attention_heads, spec.num_key_value_heads
    if heads % shared:
        what = f"{source}: {heads} attention heads cannot share {shared} key-value heads"
        raise UnsupportedModelError(what, mend="num_attention_heads must be a multiple of num_key_value_heads")
    if spec.head_dim % 2:
        raise UnsupportedModelError(f"{source}: head_dim {spec.head_dim} is odd", mend="RoPE needs an even head_dim")


def _family(config: dict[str, Any], source: str) -> Family:
    known = ", ".join(FAMILIES)
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UnsupportedModelError(f"{source}: model_type {name!r} is not supported", mend=f"use one of {known}")
    return FAMILIES[name]


def _mlp_width(config: dict[str, Any], width: int, source: str) -> int:
    """LFM2's configs may give the width of an ungated MLP, to be made that of a gated one (see Lfm2MLP)."""
    if not config.get("block_auto_adjust_ff_dim", False):
        return width
    factor, multiple = config.get("block_ffn_dim_multiplier"), config.get("block_multiple_of")
    if not isinstance(factor, int | float) or not isinstance(multiple, int) or multiple < 1 or factor <= 0:
        what = f"{source}: block_ffn_dim_multiplier is {factor!r}, block_multiple_of {multiple!r}"
        raise UnsupportedModelError(what, mend="they must be positive numbers, the second a whole one")
    return multiple * -(-int(factor * int(2 * width / 3)) // multiple)


def _refuse_other_layers(config: dict[str, Any], family: Family, source: str) -> None:
    """Every layer must have the family's one mixer."""
    kinds = config.get("layer_types")
    if family.layout.mixer == "attention":
        if any(kind != "full_attention" for kind in kinds or ()):
            what = f"{source}: layer_types = {kinds!r} names layers other than full_attention"
            raise UnsupportedModelError(what, mend=MEND)
        return
    if kinds is None:  # as Lfm2Config reads it: without a list every layer attends
        attention = config.get("full_attn_idxs")
        hybrid = attention is None or bool(attention)
    else:
        hybrid = len(kinds) != config.get("num_hidden_layers") or any(kind != "conv" for kind in kinds)
    if hybrid:
        field = "full_attn_idxs" if kinds is None else "layer_types"
        what = f"{source}: {field} = {config.get(field)!r} names layers other than conv: hybrids are not supported"
        raise UnsupportedModelError(what, mend="use a model whose layers are all convolutions, or none")


def _refuse_unknown(config: dict[str, Any], family: Family, source: str) -> None:
    def refuse(field: str, why: str) -> None:
        raise UnsupportedModelError(f"{source}: {field} = {config.get(field)!r} {why}", mend=MEND)

    for field in sorted(set(config) - (USED - family.lacks) - HARMLESS - family.fields - set(family.aliases)):
        if config[field] not in (None, False):
            known = USED.union(*(other.fields | set(other.aliases) for other in FAMILIES.values()))
            refuse(
                field, f"does not belong to {config['model_type']}" if field in known else "is not known to orin-kit"
            )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "is not supported (only silu)")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        refuse("partial_rotary_factor", "is not supported")
    # Mistral has no switch: its window is on whenever it is set.
    switched_on = config.get("use_sliding_window", config["model_type"] == "mistral")
    window = config.get("sliding_window")
    if switched_on and window and window < config.get("max_position_embeddings", 0):
        refuse("sliding_window", "is shorter than the context; sliding windows are not supported")
