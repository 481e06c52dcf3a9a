"""State of a model that FSDP has sharded: whole on disk, in pieces in memory.

FSDP (version 2) makes every parameter a DTensor, of which each process holds its piece; optimizer states follow. A
checkpoint holds whole tensors, so it can be resumed by any number of processes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gathered(tree: Any, *, keep: bool = True) -> Any:
    """A state dict, list or tensor with every DTensor made whole, on the CPU. All processes must call it.

    Args:
        tree: what to gather.
        keep: false where the result is not used: its memory is let go tensor by tensor.
    """
    if isinstance(tree, dict):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [gathered(value, keep=keep) for value in tree]
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    return tree


def scattered(tree: Any, like: Any) -> Any:
    """The reverse: tensors of `tree` cut as those at the same place of `like` are; others stay as they are."""
    if isinstance(tree, dict):
        return {key: scattered(value, like.get(key) if isinstance(like, dict) else like) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        places = like if isinstance(like, list | tuple) else [like] * len(tree)
        return [scattered(value, place) for value, place in zip(tree, places, strict=True)]
    if isinstance(tree, Tensor) and isinstance(like, DTensor) and tree.shape == like.shape:
        return distribute_tensor(tree.to(like.device), like.device_mesh, like.placements)
    return tree


def local(tensor: Tensor) -> Tensor:
    """A process's own piece of a tensor; all of it where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
