"""Optimizers of a stage: for the student's weights and for what the stage learns beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from orin_kit.distill.recipe import Recipe, Stage

BETAS = (0.9, 0.98)


def make_optimizers(module: nn.Module, stage: Stage, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for everything that is trained, or Muon for the student's hidden matrices and AdamW for the rest.

    Muon (https://kellerjordan.github.io/posts/muon/) needs far fewer steps on small models. Embeddings, norms, biases,
    adapters, projections and mixers are always AdamW's; only matrices of the student decay. What a stage learns beside
    the student has a learning rate of its own.
    """
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "tables": [], "small": [], "own": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[_group_of(name, parameter)].append(parameter)
    if recipe.optimizer == "adamw":
        groups["tables"] += groups.pop("hidden")
    peaks = {"own": getattr(stage, "own_learning_rate", stage.learning_rate)}
    decays = {"hidden": recipe.weight_decay, "tables": recipe.weight_decay}
    made: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": []}
    for name, parameters in groups.items():
        peak = peaks.get(name, stage.learning_rate)
        group = {"params": parameters, "weight_decay": decays.get(name, 0.0), "lr": peak, "peak": peak}
        if parameters:
            made["muon" if name == "hidden" else "adamw"].append(group)
    return [MAKERS[name](chosen) for name, chosen in made.items() if chosen]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if not name.startswith("student."):
        return "own"
    if parameter.ndim != 2 or "lora_" in name:
        return "small"
    return "tables" if "embed" in name or "lm_head" in name else "hidden"


MAKERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=BETAS),
    # Scaled so that one learning rate does for both optimizers (arXiv:2502.16982).
    "muon": lambda groups: torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"),
}


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for group in chain.from_iterable(o.param_groups for o in optimizers):
        group["lr"] = share * group["peak"]
