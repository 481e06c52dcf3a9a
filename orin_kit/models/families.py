"""What each family of decoders does that its config does not say, as data.

Sources: transformers/models/{qwen2,qwen3,llama,mistral,lfm2}.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its parts, below `model.layers.N.` but for `norm`; every layer is the same:

    `x += mixer_out(mixer(mixer_in(mixer_norm(x))))`, `x += down(silu(gate(n)) * up(n))` with `n = mlp_norm(x)`.

    Attributes:
        mixer: what lets positions see each other, "attention" or "conv" (a gated causal depthwise convolution).
        mixer_in: the linears that read the normed input, in the order in which the mixer takes them.
        conv: the convolution itself, weight `[hidden, 1, conv_kernel_size]`; None with attention.
        norm: the model's last norm.
    """

    mixer: str
    mixer_norm: str
    mixer_in: tuple[str, ...]
    mixer_out: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    norm: str
    conv: str | None = None


LLAMA = Layout(
    mixer="attention",
    mixer_norm="input_layernorm",
    mixer_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    mixer_out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm="model.norm",
)
LFM2 = Layout(
    mixer="conv",
    mixer_norm="operator_norm",
    mixer_in=("conv.in_proj",),
    mixer_out="conv.out_proj",
    mlp_norm="ffn_norm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    norm="model.embedding_norm",
    conv="conv.conv",
)


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        layout: names of the parts.
        traits: `DecoderSpec`'s yes-or-no fields, False where not given; a string is the config's field that says it.
        aliases: the family's own names of fields -> what the other families call them.
        fields: what only this family's configs have.
        lacks: fields of the other families that it calls otherwise, and would not read.
        defaults: of fields that a config may leave out, where they are not the other families'.
    """

    layout: Layout
    traits: dict[str, bool | str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    fields: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()
    defaults: dict[str, bool | int | float] = field(default_factory=dict)


ATTENTION_BIAS: dict[str, bool | str] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
FAMILIES: dict[str, Family] = {
    "qwen2": Family(LLAMA, {"qkv_bias": True}),
    "qwen3": Family(LLAMA, ATTENTION_BIAS | {"qk_norm": True}, fields=frozenset({"attention_bias"})),
    "llama": Family(LLAMA, ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}, fields=frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Family(LLAMA),
    "lfm2": Family(
        LFM2,
        {"conv_bias": "conv_bias"},
        aliases={
            "norm_eps": "rms_norm_eps",
            "block_ff_dim": "intermediate_size",
            "tie_embedding": "tie_word_embeddings",
        },
        fields=frozenset(
            {
                "conv_bias", "conv_L_cache", "full_attn_idxs", "block_auto_adjust_ff_dim", "block_multiple_of",
                "block_ffn_dim_multiplier",
            }
        ),
        lacks=frozenset({"rms_norm_eps"}),
        defaults={
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "conv_L_cache": 3, "block_auto_adjust_ff_dim": True,
            "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
        },
    ),
}  # fmt: skip
