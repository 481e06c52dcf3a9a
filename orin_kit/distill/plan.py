"""`orin-kit distill --plan`: what a recipe asks of the machine, from the models' config.json alone.

The run's own modules, optimizers and teacher are built on torch's meta device: shapes, no data. What they hold is
counted, not derived: weights, gradients, optimizer states and saved activations (`activations.py`). Estimates are the
working memory of logits and attention maps, what FSDP gathers, and the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import PreTrainedModel

from orin_kit.distill.checkpoint import CheckpointStore
from orin_kit.distill.dataset import Batches
from orin_kit.distill.heads import LayerHeads, keep_heads
from orin_kit.distill.layers import compared_layers
from orin_kit.distill.pair import DTYPES, Pair, load_model
from orin_kit.distill.recipe import Aligned, Attention, Recipe
from orin_kit.distill.signals import Teacher
from orin_kit.distill.stage_plan import Memory, StagePlan, stage_plan
from orin_kit.distill.stage_setup import StageBuilder
from orin_kit.tokenizer import ChatTokenizer

MARGIN = 0.1  # of a GPU: CUDA's own context, the allocator's fragments, what the estimate misses
COUNTS = tuple(2**n for n in range(8))  # numbers of GPUs that are tried
PEAK_FLOPS = {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}  # dense, a second; NVIDIA H100 SXM datasheet
MFU = 0.4  # share of the peak that the estimate of time assumes


@dataclass(frozen=True)
class Parameters:
    """Of one model: all, those of the token embedding, and those of the head where it is not the embedding itself."""

    total: int
    embedding: int
    head: int


@dataclass(frozen=True)
class Plan:
    """A recipe's demands.

    Attributes:
        gpu_bytes: memory of one GPU.
    """

    recipe: Recipe
    teacher: Parameters
    student: Parameters
    stages: tuple[StagePlan, ...]
    gpu_bytes: int

    @property
    def gpus(self) -> int | None:
        """The fewest of `COUNTS` whose share fits into `budget` in every stage; None where none does."""
        fits = (n for n in COUNTS if all(self.memory(stage, n).total <= self.budget for stage in self.stages))
        return next(fits, None)

    @property
    def budget(self) -> int:
        """Bytes of one GPU less the margin."""
        return int(self.gpu_bytes * (1 - MARGIN))

    @property
    def step_tokens(self) -> int:
        """Of one step on one GPU, every row full."""
        return self.recipe.batch_size * self.recipe.accumulation * self.recipe.data.row_length

    @property
    def seconds(self) -> float:
        """Of all steps, at `MFU` of the peak; more GPUs do more rows in the same time."""
        return sum(stage.steps * stage.flops for stage in self.stages) / (MFU * PEAK_FLOPS[self.recipe.precision])

    def memory(self, stage: StagePlan, gpus: int) -> Memory:
        """On each of several GPUs with FSDP: the student is sharded, the teacher and the batch are not."""
        if gpus == 1:
            return stage.memory
        whole = stage.memory
        # Between micro-batches gradients are summed up unsharded (accelerate's no_sync).
        waiting = stage.trained_bytes if self.recipe.accumulation > 1 else 0
        sharded = {
            name: math.ceil(getattr(whole, name) / gpus) for name in ("student", "gradients", "optimizer", "average")
        }
        return replace(whole, **sharded, gathered=stage.layer_bytes + stage.rest_bytes + waiting)


def plan(recipe: Recipe, gpu_bytes: int = 80 * 10**9) -> Plan:
    """What a recipe asks for; neither weights, tokenizers nor data are read.

    Args:
        recipe: see `Recipe.load`.
        gpu_bytes: memory of one GPU.

    Raises:
        ArtifactError: a config.json is missing or broken.
        UnsupportedModelError: a family or field that orin-kit does not know, or weights that are quantized already.
        UserError: layers or modules are named that the models do not have.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        teacher = load_model(recipe.teacher or recipe.student, DTYPES[recipe.precision], seed=0)
        student = load_model(recipe.student, seed=0)
    counted = _parameters(teacher), _parameters(student)
    builder = _UnmeasuredStages(recipe, teacher, student)
    stages = tuple(stage_plan(recipe, name, stage, builder) for name, stage in recipe.running_stages())
    return Plan(recipe, *counted, stages, gpu_bytes)


class _UnmeasuredStages(StageBuilder):
    """The run's stages, with what the run would measure left at what costs the same: no data is read."""

    def __init__(self, recipe: Recipe, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        # Of the tokenizer a stage asks the number of tokens alone, which changes no size.
        tokenizer = cast(ChatTokenizer, range(student.config.vocab_size))
        pair = Pair(teacher.eval().requires_grad_(False), student, tokenizer, tokenizer, recipe.student)
        nothing = cast(Teacher, None), cast(Batches, None), cast(CheckpointStore, None)
        super().__init__(recipe, pair, *nothing, first=False)

    def layers(self, stage: Aligned, field: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert self.pair.teacher is not None
        depth, teacher_depth = (m.config.num_hidden_layers for m in (self.pair.student, self.pair.teacher))
        return compared_layers(stage, field, depth, teacher_depth)

    def heads(self, stage: Attention, layers: tuple[int, ...]) -> list[LayerHeads]:
        assert self.pair.teacher is not None
        alike = [0.0] * self.pair.teacher.config.num_attention_heads
        kept = keep_heads(alike, stage.keep_heads, stage.prefer)
        return [LayerHeads(layer, alike, kept) for layer in sorted(set(layers))]


def _parameters(model: PreTrainedModel) -> Parameters:
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    own_head = 0 if head is table else head.numel()
    return Parameters(sum(p.numel() for p in model.parameters()), table.numel(), own_head)


# --- what is printed -------------------------------------------------------------------------------------------------

KINDS = {
    "teacher": "teacher",
    "student": "student and what learns beside it",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "average": "moving average",
    "gathered": "gathered from other GPUs",
    "copies": "copies in lower precision",
    "signal": "read from the teacher",
    "activations": "activations",
    "maps": "attention maps, in blocks",
    "logits": "logits, in chunks",
}


def plan_table(plan: Plan) -> RenderableType:
    """What `--plan` prints: parameters, memory of each stage, work and time."""
    tables = _parameter_table(plan), _memory_table(plan), _sharded_table(plan), _work_table(plan)
    return Group(*tables, _verdict(plan))


def _parameter_table(plan: Plan) -> Table:
    table = Table(title="parameters", title_justify="left")
    for column in ("", "all", "embedding", "head", "trained", "of them adapters", "of them beside the student"):
        table.add_column(column, justify="right" if column else "left")
    for name, of in (("teacher", plan.teacher), ("student", plan.student)):
        table.add_row(name, f"{of.total:,}", f"{of.embedding:,}", f"{of.head:,}" if of.head else "tied")
    for stage in plan.stages:
        table.add_row(
            f"stage {stage.name}", "", "", "", *(f"{n:,}" for n in (stage.trained, stage.adapters, stage.beside))
        )
    return table


def _memory_table(plan: Plan) -> Table:
    """A column for each stage, on as many GPUs as are needed."""
    gpus = plan.gpus or 1
    memories = [plan.memory(stage, gpus) for stage in plan.stages]
    where = "one GPU" if gpus == 1 else f"each of {gpus} GPUs (FSDP)"
    table = Table(title=f"memory of {where} at a stage's peak, GB (1e9 bytes)", title_justify="left")
    for column in ("", *(stage.name for stage in plan.stages)):
        table.add_column(column, justify="right" if column else "left")
    for kind, label in KINDS.items():
        sizes = [getattr(memory, kind) for memory in memories]
        if any(sizes):
            table.add_row(label, *map(_gb, sizes))
    table.add_section()
    table.add_row("total", *(_gb(memory.total) for memory in memories), style="bold")
    table.add_section()
    recomputes = plan.recipe.activation_checkpointing
    for label, name, chosen in (
        ("activations without checkpointing", "activations_kept", not recomputes),
        ("activations with checkpointing", "activations_recomputed", recomputes),
    ):
        mark = " (the recipe)" if chosen else ""
        table.add_row(label + mark, *(_gb(getattr(stage, name)) for stage in plan.stages), style="dim")
    return table


def _sharded_table(plan: Plan) -> Table:
    """Totals by number of GPUs, as far as it makes a difference worth a row."""
    table = Table(title="total of each GPU by their number, GB; the batch is each GPU's own", title_justify="left")
    for column in ("GPUs", *(stage.name for stage in plan.stages), ""):
        table.add_column(column, justify="right" if column else "left")
    for gpus in [n for n in COUNTS if n <= max(8, plan.gpus or COUNTS[-1])]:
        totals = [plan.memory(stage, gpus).total for stage in plan.stages]
        fits = "fits" if max(totals) <= plan.budget else "too much"
        table.add_row(str(gpus), *map(_gb, totals), fits)
    return table


def _work_table(plan: Plan) -> Table:
    table = Table(title="work of each GPU", title_justify="left")
    for column in ("stage", "steps", "tokens a step", "tokens", "TFLOP a step", "s a step (est.)", "h (est.)"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    speed = MFU * PEAK_FLOPS[plan.recipe.precision]
    for stage in plan.stages:
        seconds = stage.flops / speed
        tokens = f"{plan.step_tokens:,}", f"{plan.step_tokens * stage.steps:,}"
        work = f"{stage.flops / 1e12:.1f}", f"{seconds:.2f}", f"{seconds * stage.steps / 3600:.2f}"
        table.add_row(stage.name, str(stage.steps), *tokens, *work)
    steps = sum(stage.steps for stage in plan.stages)
    flops = ("", "", f"{plan.seconds / 3600:.2f}")
    table.add_row("all", str(steps), f"{plan.step_tokens:,}", f"{plan.step_tokens * steps:,}", *flops, style="bold")
    return table


def _verdict(plan: Plan) -> str:
    size, budget = f"{plan.gpu_bytes / 1e9:g} GB", f"{plan.budget / 1e9:g} GB"
    if plan.gpus is None:
        largest = max(plan.memory(stage, COUNTS[-1]).total for stage in plan.stages)
        need = (
            f"does not fit even on {COUNTS[-1]} GPUs of {size}: each needs {_gb(largest)} GB, and {budget} are counted"
            " on; lower batch_size (and raise accumulation), or set activation_checkpointing: true"
        )
    else:
        how = "" if plan.gpus == 1 else " with FSDP (accelerate launch)"
        need = f"GPUs needed: {plan.gpus} of {size}{how}; {100 * MARGIN:g} % of each is left as a margin"
    return (
        f"{need}\nWeights, gradients, optimizer states and saved activations are counted on the run's own modules;"
        f" logits and what is gathered are estimates. Time is an estimate for H100 SXM at {100 * MFU:g} % of"
        f" {PEAK_FLOPS[plan.recipe.precision] / 1e12:g} TFLOP/s ({plan.recipe.precision}), every row full; it leaves"
        " out attention scores, the optimizer, sampling, the teacher's answers and scoring."
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 5e6 or not size else f"{size / 1e9:.5f}"
