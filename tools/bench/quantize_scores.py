"""How far a quantized checkpoint is from the model it was made of: the one evaluator of `quantize_peers.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F

from orin_kit.data.packing import IGNORE, Batch, Example, collate
from orin_kit.data.tasks import distinct
from orin_kit.evaluate.exact_match import exact_match
from orin_kit.export.export import export
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.spec import read_config
from orin_kit.quantize.layerwise import LayerwiseDecoder
from orin_kit.runtime.runtime import open_runtime
from orin_kit.tokenizer import copy_tokenizer

ROWS = 16  # chats that are padded to one length
HEAD_TOKENS = 1024  # whose logits are in memory together


def example_batches(examples: Sequence[Example]) -> list[Batch]:
    """Chats of like length together, so that little is padding; those without an answer left out."""
    rest = sorted((e for e in examples if any(e.trained[1:])), key=lambda e: len(e.ids))
    return [collate(rest[start : start + ROWS], pad_id=0) for start in range(0, len(rest), ROWS)]


class Judge:
    """Compares checkpoints with the fp16 one, on the answers in chats.

    Args:
        reference: the directory of the fp16 checkpoint.
        batches: the chats; labels say which tokens count.
    """

    def __init__(self, reference: Path, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._labels = torch.cat([torch.from_numpy(b.labels[b.labels != IGNORE]) for b in batches])
        self._states, self._head = last_states(reference, batches)

    @torch.no_grad()
    def scores(self, directory: Path) -> dict[str, float]:
        """Of a checkpoint, plain or quantized, over all asked tokens.

        Returns:
            `perplexity`; `divergence`, the mean KL(fp16 || this) in nats a token; `agreement`, the share of tokens
            that both models would have chosen alike.
        """
        states, head = last_states(directory, self._batches)
        nll = divergence = alike = 0.0
        for start in range(0, len(states), HEAD_TOKENS):
            part = slice(start, start + HEAD_TOKENS)
            expected = (self._states[part] @ self._head.T).log_softmax(-1)
            found = (states[part] @ head.T).log_softmax(-1)
            nll += F.nll_loss(found, self._labels[part], reduction="sum").item()
            # In fp64: the divergence is small beside the terms it is a sum of.
            divergence += F.kl_div(found.double(), expected.double(), reduction="sum", log_target=True).item()
            alike += int((found.argmax(-1) == expected.argmax(-1)).sum())
        count = len(self._labels)
        return {
            "perplexity": math.exp(nll / count),
            "divergence": divergence / count,
            "agreement": alike / count,
        }


@torch.no_grad()
def last_states(directory: Path, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads at every asked token `[tokens, hidden]`, and the head `[vocab, hidden]`; fp32."""
    decoder = LayerwiseDecoder(Checkpoint(directory))
    hidden = [decoder.embed(torch.from_numpy(batch.input_ids)) for batch in batches]
    for index in range(decoder.checkpoint.spec.num_hidden_layers):
        layer = decoder.layer(index)
        hidden = [torch.cat([out for _, out in decoder.run(layer, states)]) for states in hidden]
    norm = decoder.norm()
    asked = [states[torch.from_numpy(b.labels != IGNORE)] for states, b in zip(hidden, batches, strict=True)]
    return torch.cat([norm(states.to(decoder.device)) for states in asked]), decoder.head()


def write_plain(directory: Path, out: Path) -> None:
    """The plain fp32 checkpoint of what a quantized one stands for."""
    checkpoint = Checkpoint(directory)
    out.mkdir()
    config = {k: v for k, v in read_config(directory).items() if k != "quantization_config"}
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")
    tensors = {name: np.ascontiguousarray(checkpoint.float32(name)) for name in checkpoint.spec.tensor_shapes()}
    save_file(tensors, out / "model.safetensors")


def answer_accuracy(directory: Path, tokenizer: Path, questions: int, scratch: Path) -> float:
    """Exact match on unseen tasks, greedy, of the dequantized weights exported in fp32.

    Args:
        directory: the checkpoint.
        tokenizer: the directory that has its tokenizer.
        questions: how many.
        scratch: where the plain checkpoint and the ONNX model may lie.
    """
    plain, onnx = scratch / "plain", scratch / "onnx"
    write_plain(directory, plain)
    copy_tokenizer(tokenizer, plain)
    export(plain, onnx, precision="fp32", progress=False)
    runtime = open_runtime(onnx, max_len=256, batch_size=1)
    return exact_match(runtime, distinct("test", seed=1, count=questions), batch_size=64)["all"]
