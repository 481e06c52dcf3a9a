"""A checkpoint as a transformers model, and prompts as it takes them in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from orin_kit.errors import ArtifactError
from orin_kit.models.weights import WeightSource


def load_pretrained(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load weights and config; nothing but safetensors is read.

    Raises:
        ArtifactError: weights are missing, damaged, or do not belong to the config.
    """
    logging.disable_progress_bar()  # ours are enough
    WeightSource(directory)  # a file cut short ends here, with its name
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(f"{directory} cannot be loaded: {error}", mend="copy the model again, whole") from error
    missing = sorted(found["missing_keys"])
    if missing:
        what = f"{directory} lacks {len(missing)} tensors of its config, first {missing[0]}"
        raise ArtifactError(what, mend="config.json and the weights must be of one model")
    loaded: PreTrainedModel = model
    return loaded


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 `[prompts, longest]`: what follows a prompt begins in one column for all."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
