"""Training a small decoder from scratch: the loop that `train_demo_teacher.py` and `train_text_model.py` share.

Every line of the log is a JSON object. A kill loses at most `save_every` steps: the same command goes on from there.
The learning rate warms up, is constant, then falls linearly over the last 30 % (warm-up, stable, decay).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel

WARMUP_STEPS = 100
DECAY_SHARE = 0.3
LOG_EVERY = 50

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]  # input ids and labels `[rows, length]`; -100 is not asked


@dataclass(frozen=True)
class Plan:
    """How long, how fast, and where its files lie.

    Attributes:
        directory: of `train.pt` and `train.log.jsonl`.
        steps: in all, those of earlier calls included.
        peak_lr: the learning rate between warm-up and decay.
        eval_every, save_every: in steps; the last one always counts.
        compile: the decoder with torch.compile.
    """

    directory: Path
    steps: int
    peak_lr: float
    eval_every: int
    save_every: int
    compile: bool


def learning_rate(step: int, steps: int, peak: float) -> float:
    decay = max(1, round(steps * DECAY_SHARE))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay)


def muon(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for everything else."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    groups = _groups(model, [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" in name], 0.01)
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)),
    ]


def adamw(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, as most published models were trained."""
    groups = _groups(model, [p for p in model.parameters() if p.ndim == 2], 0.1)
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))]


def _groups(model: PreTrainedModel, decayed: list[torch.nn.Parameter], decay: float) -> list[dict[str, Any]]:
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def say(directory: Path, line: dict[str, Any]) -> None:
    """A line for the reader and the log."""
    text = json.dumps(line)
    print(text, flush=True)
    with (directory / "train.log.jsonl").open("a", encoding="utf-8") as log:
        print(text, file=log)


def fit(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Callable[[int], Iterator[Batch]],
    plan: Plan,
    evaluate: Callable[[], dict[str, Any]],
    on_save: Callable[[int], object] = lambda step: None,
) -> None:
    """Train fp32 weights, from the last checkpoint in the directory if there is one; bf16 autocast where AVX-512 is.

    Args:
        model: with a body `model.model` and a head `model.lm_head`.
        optimizers: of all its parameters.
        batches: gives the batches from a step on; a step's batch depends on its number alone, so resuming needs no
            replay.
        plan: how long.
        evaluate: what to add to the log line of every `eval_every`-th step.
        on_save: called with the number of steps done, after each checkpoint.
    """
    checkpoint = plan.directory / "train.pt"
    start = _resume(checkpoint, model, optimizers)
    body = torch.compile(model.model) if plan.compile else model.model
    seen, since = 0, time.perf_counter()
    for done, batch in enumerate(batches(start), start + 1):
        for group in chain.from_iterable(o.param_groups for o in optimizers):
            group["lr"] = learning_rate(done - 1, plan.steps, plan.peak_lr)
        loss = _step(model, body, optimizers, batch, done)
        seen += batch[0].size
        last = done == plan.steps
        if done % LOG_EVERY == 0 or last:
            speed, seen = seen / (time.perf_counter() - since), 0
            line: dict[str, Any] = {"step": done, "loss": round(loss, 4), "tokens_per_second": round(speed)}
            if done % plan.eval_every == 0 or last:
                line |= evaluate()
                model.train()
            say(plan.directory, line)
            since = time.perf_counter()
        if done % plan.save_every == 0 or last:
            fresh = checkpoint.with_suffix(".new")
            states = [o.state_dict() for o in optimizers]
            torch.save({"step": done, "model": model.state_dict(), "optimizer": states}, fresh)
            fresh.replace(checkpoint)
            on_save(done)


def _resume(checkpoint: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """The number of steps already done."""
    if not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizer"], strict=True):
        optimizer.load_state_dict(kept)
    return int(state["step"])


def _step(
    model: PreTrainedModel, body: Any, optimizers: Sequence[torch.optim.Optimizer], batch: Batch, number: int
) -> float:
    input_ids, labels = map(torch.from_numpy, batch)
    asked = labels >= 0
    # Without AVX-512, multiplying in bf16 takes many times as long as in fp32.
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_supported()):
        hidden = body(input_ids=input_ids).last_hidden_state
        logits = model.lm_head(hidden[asked])
    loss = F.cross_entropy(logits.float(), labels[asked])
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(norm.item()):
        raise SystemExit(f"step {number}: the gradient is not finite; run again to go on from the last checkpoint")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()
