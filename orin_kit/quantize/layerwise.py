"""A decoder run one layer at a time: transformers' own layer modules, only one of them in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.spec import EMBEDDING, HEAD

BATCH_TOKENS = 2048  # that go through a layer together
ATTENTION = "sdpa"  # of transformers' attention functions


class LayerwiseDecoder:
    """The layers of a checkpoint in fp32; packed weights are dequantized.

    Hidden states stay on the CPU between layers, `[rows, length, hidden]`. Rows are attended causally and without a
    mask, so padding belongs on the right.

    Attributes:
        device: where layers run: a GPU if there is one.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config  # the layers are built plain
        with torch.device("meta"):
            build: Any = AutoModelForCausalLM.from_config
            skeleton = build(config, dtype=torch.float32, attn_implementation=ATTENTION)
        self._decoder = skeleton.eval().model
        # Its frequencies are no weights, so they are not on disk: made again, off the meta device.
        self._rotary = type(self._decoder.rotary_emb)(config=config).to(self.device)

    def embed(self, ids: torch.Tensor, table: NDArray[Any] | None = None) -> torch.Tensor:
        """Token ids int64 `[rows, length]` -> hidden states; only the rows of the table that are asked for are read.

        Args:
            ids: what to look up.
            table: instead of the checkpoint's embedding `[vocab, hidden]`.
        """
        table = self.checkpoint.tensor(f"{EMBEDDING}.weight") if table is None else table
        wanted, places = torch.unique(ids, return_inverse=True)
        return torch.from_numpy(table[wanted.numpy()].astype("float32"))[places]

    def layer(self, index: int) -> torch.nn.Module:
        """Load a decoder layer; drop the reference to free it."""
        layer: torch.nn.Module = self._decoder.layers[index]
        names = [name for name, _ in layer.named_parameters()]
        self._decoder.layers[index] = torch.nn.Identity()
        loaded = {name: self._load(f"model.layers.{index}.{name}") for name in names}
        layer.load_state_dict(loaded, assign=True)
        return layer.requires_grad_(False)

    def norm(self) -> torch.nn.Module:
        """Load the norm before the head."""
        name = self.checkpoint.spec.layout.norm
        norm: torch.nn.Module = self._decoder.get_submodule(name.removeprefix("model."))
        norm.load_state_dict({"weight": self._load(f"{name}.weight")}, assign=True)
        return norm.requires_grad_(False)

    def head(self) -> torch.Tensor:
        """Load the head's weight `[vocab, hidden]`."""
        return self._load(f"{HEAD}.weight")

    @torch.no_grad()
    def run(self, layer: torch.nn.Module, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Run a layer over all rows, a few at a time: which rows, and their new hidden states (on the CPU)."""
        length = hidden.shape[1]
        positions = torch.arange(length, device=self.device)[None]
        rows = max(1, BATCH_TOKENS // length)
        for first in range(0, len(hidden), rows):
            batch = slice(first, first + rows)
            x = hidden[batch].to(self.device)
            rotary = self._rotary(x, positions)
            out: Any = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            yield batch, out.cpu()

    def _load(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.checkpoint.float32(name)).to(self.device)
