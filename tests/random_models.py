"""Random decoders, inputs and export options for hypothesis to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from families import LINEAR, LLAMA3, YARN

ROPES: dict[str, dict[str, Any] | None] = {"plain": None, "llama3": LLAMA3, "yarn": YARN, "linear": LINEAR}
MAX_LEN = 32
STEPS = 2  # decoded after the prefill


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family of `families.FAMILIES`, and changes to its config. Sizes fit every dialect's kernels."""
    kv_heads = draw(st.integers(1, 2))
    sizes = dict(
        num_hidden_layers=draw(st.integers(1, 2)),
        hidden_size=128 * draw(st.integers(1, 3)),
        intermediate_size=128 * draw(st.integers(1, 3)),
        vocab_size=8 * draw(st.integers(16, 80)),
    )
    if draw(st.integers(0, 4)) == 0:
        conv = dict(conv_L_cache=draw(st.integers(2, 6)), conv_bias=draw(st.booleans()), block_auto_adjust_ff_dim=False)
        return "conv", {**sizes, **conv, "tie_word_embeddings": draw(st.booleans())}
    head_dim, heads = draw(st.sampled_from([64, 128])), kv_heads * draw(st.integers(1, 4))
    heads = heads if heads * head_dim % 128 == 0 else 2 * heads  # o_proj's width, for the plugins
    if heads % 3 == 0:
        sizes["hidden_size"] = 384  # LlamaConfig wants a multiple of the heads
    attention = dict(
        num_key_value_heads=kv_heads,
        num_attention_heads=heads,
        head_dim=head_dim,
        tie_word_embeddings=draw(st.booleans()),
    )
    family = draw(st.sampled_from(["qwen2", "qwen3", "llama-biased-linear", "mistral"]))
    changes: dict[str, Any] = {**sizes, **attention}
    if family == "llama-biased-linear":
        changes |= dict(attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))
    rope = ROPES[draw(st.sampled_from(sorted(ROPES)))]
    return family, changes | ({} if rope is None else {"rope_parameters": rope})


@st.composite
def rows(draw: st.DrawFn, vocab_size: int) -> list[NDArray[np.int64]]:
    """Rows of a ragged batch, with the tokens that will be decoded at their ends."""
    lengths = draw(st.lists(st.integers(1, 10), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [rng.integers(0, vocab_size, length + STEPS) for length in lengths]


def precisions() -> st.SearchStrategy[dict[str, Any]]:
    """Of the weights: plain, or INT4 in groups of a size."""
    int4 = st.sampled_from([32, 64, 128]).map(lambda size: dict(precision="int4", group_size=size))
    return st.one_of(st.just(dict(precision="fp32")), int4)
