"""Optimizers of a stage: for the student's weights and for what the stage learns beside them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn

from orin_kit.distill.recipe import Recipe

BETAS = (0.9, 0.98)


def make_optimizers(module: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for everything that is trained, or Muon for the student's hidden matrices and AdamW for the rest.

    Muon (https://kellerjordan.github.io/posts/muon/) needs far fewer steps on small models. Embeddings, norms, biases,
    adapters, projections and mixers are always AdamW's; only matrices of the student decay.
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [(name, p) for name, p in trained if name.startswith("student.") and p.ndim == 2 and "lora_" not in name]
    hidden = [p for name, p in decayed if recipe.optimizer == "muon" and "embed" not in name and "lm_head" not in name]
    taken = {id(p) for p in hidden}
    tables = [p for _, p in decayed if id(p) not in taken]
    taken |= {id(p) for p in tables}
    plain = [p for _, p in trained if id(p) not in taken]
    groups = [
        {"params": tables, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = []
    if tables or plain:
        made.append(torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=BETAS))
    if hidden:
        # Scaled so that one learning rate does for both optimizers (arXiv:2502.16982).
        muon = torch.optim.Muon(hidden, lr=1.0, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        made.append(muon)
    return made


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    for group in chain.from_iterable(o.param_groups for o in optimizers):
        group["lr"] = rate
