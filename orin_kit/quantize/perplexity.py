"""Perplexity of the assistant's tokens in chats, the number that is compared before and after quantizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from orin_kit.data.packing import IGNORE, Example, collate
from orin_kit.errors import UserError
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.quantize.kv_scales import caching, int8_store
from orin_kit.quantize.layerwise import LayerwiseDecoder

HEAD_TOKENS = 256  # whose logits are in memory together: [256, vocab] fp32


@torch.no_grad()
def perplexity(
    directory: str | Path, examples: Sequence[Example], on_layer: Callable[[], object] | None = None
) -> float:
    """exp of the mean negative log likelihood of every `trained` token given all tokens before it in its example.

    Computed in fp32, one decoder layer in memory at a time; packed checkpoints are dequantized. Keys and values are
    rounded to int8 where the checkpoint has scales for them.

    Args:
        directory: a checkpoint, plain or quantized.
        examples: chats as tokens, none longer than the model's context.
        on_layer: called after each decoder layer, for progress.

    Raises:
        UserError: no example has a trained token, or the model's outputs are not finite.
        ArtifactError, UnsupportedModelError: see `Checkpoint`.
    """
    decoder = LayerwiseDecoder(Checkpoint(directory))
    batch = collate(examples, pad_id=0)
    labels = torch.from_numpy(batch.labels)
    asked = labels != IGNORE
    if not asked.any():
        raise UserError("no assistant tokens to measure perplexity on", mend="give longer samples or other chats")
    hidden = decoder.embed(torch.from_numpy(batch.input_ids))
    for index in range(decoder.checkpoint.spec.num_hidden_layers):
        layer, scales = decoder.layer(index), decoder.checkpoint.kv_scales(index)
        with nullcontext() if scales is None else caching(int8_store(*scales)):
            for rows, out in decoder.run(layer, hidden):
                hidden[rows] = out
        if on_layer is not None:
            on_layer()
    hidden, labels = hidden[asked], labels[asked]

    norm, head = decoder.norm(), decoder.head()
    total = 0.0
    for start in range(0, len(labels), HEAD_TOKENS):
        part = slice(start, start + HEAD_TOKENS)
        logits = norm(hidden[part].to(decoder.device)) @ head.T
        total += torch.nn.functional.cross_entropy(logits, labels[part].to(decoder.device), reduction="sum").item()
    if not math.isfinite(total):
        what = f"{directory}: the model's outputs are not finite"
        raise UserError(what, mend="get the checkpoint again or train it again")
    return math.exp(min(total / len(labels), 700.0))
