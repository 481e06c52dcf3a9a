"""`orin-kit distill --plan`: what a recipe asks of the machine, from the models' config.json alone.

The run's own modules, optimizers and teacher are built on torch's meta device: shapes, no data. What they hold is
counted, not derived: weights, gradients, optimizer states and saved activations (`activations.py`). Estimates are the
working memory of logits and attention maps, what FSDP gathers, and the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from orin_kit.distill.activations import Kept, autocast, count_saved, on_fake_cpu, tensor_bytes
from orin_kit.distill.attention import BLOCK
from orin_kit.distill.checkpoint import CheckpointStore
from orin_kit.distill.dataset import Batches
from orin_kit.distill.heads import LayerHeads, keep_heads
from orin_kit.distill.layers import choose_layers, match_layers
from orin_kit.distill.logits import CHUNK_BYTES
from orin_kit.distill.optimizers import make_optimizers
from orin_kit.distill.pair import DTYPES, Pair, load_model
from orin_kit.distill.recipe import Aligned, Attention, Recipe, Stage
from orin_kit.distill.signals import Signal, Teacher, TensorBatch, Wants, read_signal
from orin_kit.distill.stage_setup import StageBuilder
from orin_kit.distill.stages import AttentionStage, Knobs, RelationStage, StageModule, TaskStage
from orin_kit.tokenizer import ChatTokenizer

MARGIN = 0.1  # of a GPU: CUDA's own context, the allocator's fragments, what the estimate misses
COUNTS = tuple(2**n for n in range(8))  # numbers of GPUs that are tried
LIVE_CHUNKS = 5  # tensors of a chunk's logits that live at once (`logits.py`)
PEAK_FLOPS = {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12}  # dense, a second; NVIDIA H100 SXM datasheet
MFU = 0.4  # share of the peak that the estimate of time assumes


@dataclass(frozen=True)
class Parameters:
    """Of one model: all, those of the token embedding, and those of the head where it is not the embedding itself."""

    total: int
    embedding: int
    head: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at a stage's peak, by what they are for.

    Attributes:
        teacher: its weights, in the recipe's precision.
        student: its weights and the stage's own, as they are stored (fp32).
        gradients, optimizer, average: of what is trained; `average` is the recipe's `ema`.
        gathered: with FSDP, layers that are whole for a moment, and gradients that wait for the last micro-batch.
        copies: weights in the lower precision, which autocast keeps for the backward pass.
        signal: what was read from the teacher.
        activations: saved for the backward pass, and once more one layer's for their gradients.
        maps: one block of attention maps.
        logits: chunks of logits, and the head's gradient that is summed up beside them.
    """

    teacher: int
    student: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    copies: int
    signal: int
    activations: int
    maps: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, of.name) for of in fields(self))


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        trained: parameters that learn; `beside` those of them that are not the student's: projections and mixers.
        adapters: parameters of LoRA.
        memory: on one GPU, without FSDP.
        activations_kept, activations_recomputed: bytes without and with activation_checkpointing.
        layer_bytes, rest_bytes: what FSDP gathers at once, in the precision it multiplies in: two decoder layers, and
            everything outside of them.
        trained_bytes: of gradients in that precision.
        flops: of one step on one GPU.
    """

    name: str
    steps: int
    trained: int
    beside: int
    adapters: int
    memory: Memory
    activations_kept: int
    activations_recomputed: int
    layer_bytes: int
    rest_bytes: int
    trained_bytes: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """A recipe's demands.

    Attributes:
        gpus: the fewest of `COUNTS` whose share fits into `budget` in every stage; None where none does.
        budget: bytes of one GPU less the margin.
        step_tokens: of one step on one GPU, every row full.
    """

    recipe: Recipe
    teacher: Parameters
    student: Parameters
    stages: tuple[StagePlan, ...]
    gpu_bytes: int
    gpus: int | None

    @property
    def budget(self) -> int:
        return int(self.gpu_bytes * (1 - MARGIN))

    @property
    def step_tokens(self) -> int:
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
        return replace(whole, **sharded, gathered=stage.layer_bytes + stage.rest_bytes + waiting, copies=0)


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
    stages = tuple(_stage(recipe, name, stage, builder) for name, stage in recipe.running_stages())
    found = Plan(recipe, *counted, stages, gpu_bytes, None)
    fits = (n for n in COUNTS if all(found.memory(stage, n).total <= found.budget for stage in stages))
    return replace(found, gpus=next(fits, None))


class _UnmeasuredStages(StageBuilder):
    """The run's stages, with what the run would measure left at what costs the same: no data is read."""

    def __init__(self, recipe: Recipe, teacher: PreTrainedModel, student: PreTrainedModel) -> None:
        # Of the tokenizer a stage asks the number of tokens alone, which changes no size.
        tokenizer = cast(ChatTokenizer, range(student.config.vocab_size))
        pair = Pair(teacher.eval().requires_grad_(False), student, tokenizer, tokenizer, recipe.student)
        nothing = cast(Teacher, None), cast(Batches, None), cast(CheckpointStore, None)
        super().__init__(recipe, pair, *nothing, first=False)

    def layers(self, stage: Aligned, field: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        depth, teacher_depth = (m.config.num_hidden_layers for m in (self.pair.student, self.pair.teacher))
        layers = choose_layers(stage.layers, depth, f"{field}.layers")
        return layers, match_layers(stage, field, layers, depth, teacher_depth)

    def heads(self, stage: Attention, layers: tuple[int, ...]) -> list[LayerHeads]:
        alike = [0.0] * self.pair.teacher.config.num_attention_heads
        kept = keep_heads(alike, stage.keep_heads, stage.prefer)
        return [LayerHeads(layer, alike, kept) for layer in sorted(set(layers))]


def _stage(recipe: Recipe, name: str, stage: Stage, builder: StageBuilder) -> StagePlan:
    with torch.device("meta"):
        module = builder.build(stage).train()
    teacher, student, dtype = builder.pair.teacher, builder.pair.student, DTYPES[recipe.precision]
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    held = [*module.parameters(), *module.buffers()]
    layers, width = list(student.get_decoder().layers), dtype.itemsize
    in_layers = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    rows, whole = recipe.batch_size, sum(p.numel() for p in module.parameters())
    wanted = bool(module.teacher_wants) and recipe.teacher_logits is None
    with on_fake_cpu(module, teacher):
        kept = count_saved(lambda n: _forward(recipe, module, teacher, n), module, layers)
        signal = _signal_bytes(recipe, module, teacher) if wanted else 0
    activations = [rows * size + kept.per_row.largest_layer * rows for size in _both(kept)]
    memory = Memory(
        # Where stored logits teach, the teacher itself is there only to answer questions.
        teacher=tensor_bytes([*teacher.parameters(), *teacher.buffers()])
        if recipe.teacher_logits is None or recipe.data.questions
        else 0,
        student=tensor_bytes(held),
        gradients=tensor_bytes(trained.values()),
        optimizer=_optimizer_bytes(module, stage, recipe),
        average=tensor_bytes(trained.values()) if recipe.ema else 0,
        gathered=0,
        copies=_copies(recipe, kept, trained),
        signal=rows * signal,
        activations=activations[recipe.activation_checkpointing],
        maps=_maps_bytes(recipe, module, teacher),
        logits=_logits_bytes(recipe, module, student),
    )
    return StagePlan(
        name=name,
        steps=stage.steps,
        trained=sum(p.numel() for p in trained.values()),
        beside=sum(p.numel() for key, p in trained.items() if not key.startswith("student.")),
        adapters=sum(p.numel() for key, p in trained.items() if "lora_" in key),
        memory=memory,
        activations_kept=activations[False],
        activations_recomputed=activations[True],
        layer_bytes=2 * max(in_layers) * width,
        rest_bytes=(whole - sum(in_layers)) * width,
        trained_bytes=sum(p.numel() for p in trained.values()) * width,
        flops=_flops(recipe, module, teacher if wanted else None),
    )


# --- what is counted -------------------------------------------------------------------------------------------------


def _parameters(model: PreTrainedModel) -> Parameters:
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    own_head = 0 if head is table else head.numel()
    return Parameters(sum(p.numel() for p in model.parameters()), table.numel(), own_head)


def _optimizer_bytes(module: StageModule, stage: Stage, recipe: Recipe) -> int:
    """Of the states that the run's own optimizers have after a step."""
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    states: list[Tensor] = []
    for optimizer in make_optimizers(module, stage, recipe):
        optimizer.step()
        states += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    module.zero_grad(set_to_none=True)
    return tensor_bytes(states)


def _fake_batch(recipe: Recipe, rows: int) -> TensorBatch:
    """A batch of full rows, every token an assistant's: the most that a batch of this shape can cost."""
    length = recipe.data.row_length
    ids = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.arange(length).repeat(rows, 1)
    return TensorBatch((), ids, positions, torch.zeros_like(ids), ids == 0, ids.flatten())


def _forward(recipe: Recipe, module: StageModule, teacher: PreTrainedModel, rows: int) -> list[Tensor]:
    """The student's pass and the alignment loss on fake tensors, all but the logits; returns what is compared."""
    batch, lower = _fake_batch(recipe, rows), None if recipe.precision == "fp32" else torch.bfloat16
    wants = replace(module.wants, logits=False)
    theirs = _read(teacher, batch, replace(module.teacher_wants, logits=False))
    with autocast(lower):
        own = read_signal(module.student, batch, wants)
        aligned = module.alignment(own, theirs, batch, Knobs(1.0, 1.0))
    return [*_tensors(own), *([] if aligned is None else [aligned])]


@torch.no_grad()
def _read(teacher: PreTrainedModel, batch: TensorBatch, wants: Wants) -> Signal:
    return read_signal(teacher, batch, wants) if wants else Signal()


def _signal_bytes(recipe: Recipe, module: StageModule, teacher: PreTrainedModel) -> int:
    """Of one row: the teacher's layers that are compared, and the last one's states where logits are."""
    wants = module.teacher_wants
    signal = _read(teacher, _fake_batch(recipe, 1), replace(wants, logits=False))
    last = recipe.data.row_length * teacher.config.hidden_size * DTYPES[recipe.precision].itemsize
    return tensor_bytes(_tensors(signal)) + (last if wants.logits else 0)


def _tensors(signal: Signal) -> list[Tensor]:
    of_layers = [t for layer in signal.attention for t in (layer.query, layer.key, layer.value)]
    return [*signal.hidden, *of_layers, *([] if signal.embeddings is None else [signal.embeddings])]


def _both(kept: Kept) -> tuple[int, int]:
    return kept.per_row.everything, kept.per_row.recomputed


def _copies(recipe: Recipe, kept: Kept, trained: dict[str, nn.Parameter]) -> int:
    """Autocast casts every matrix once a pass and keeps what is trained to the pass's end, recomputed or not."""
    if recipe.precision == "fp32":
        return 0
    if not recipe.activation_checkpointing:
        return kept.copies.everything
    cached = sum(p.numel() * 2 for key, p in trained.items() if p.ndim == 2 and "embed" not in key)
    return max(cached, kept.copies.largest_layer)


# --- what is estimated -----------------------------------------------------------------------------------------------


def _logits_bytes(recipe: Recipe, module: StageModule, student: PreTrainedModel) -> int:
    """Of `logits.task_loss`: chunks; the head in the lower precision; gradients of the head and of its input in fp32.

    An early exit holds gradients of its own until the backward pass.
    """
    if not module.wants.logits:
        return 0
    head, width = student.get_output_embeddings().weight, DTYPES[recipe.precision].itemsize
    states = recipe.batch_size * recipe.data.row_length * student.config.hidden_size
    chunk = max(CHUNK_BYTES, 4 * student.config.vocab_size)
    sweeps = 1 + (len(module.wants.hidden) if isinstance(module, TaskStage) else 0)
    gradients = 4 * (states + (head.numel() if head.requires_grad else 0))
    return LIVE_CHUNKS * chunk + (head.numel() * width if width < 4 else 0) + sweeps * (gradients + states * width)


def _maps_bytes(recipe: Recipe, module: StageModule, teacher: PreTrainedModel) -> int:
    """Of one block of queries in `attention.py`, forward and backward, all in fp32 `[rows, heads, BLOCK, length]`.

    The teacher's scores, masked scores and log-probabilities; the student's with probabilities and a gradient; of the
    heads that are compared both log-probabilities, probabilities, differences, products and their gradients.
    """
    if isinstance(module, AttentionStage):
        own, theirs = (m.config.num_attention_heads for m in (module.student, teacher))
        compared = max(map(len, module.kept))
    elif isinstance(module, RelationStage):
        own = theirs = compared = module.heads
    else:
        return 0
    heads = 3 * theirs + 5 * own + 8 * compared
    return 4 * recipe.batch_size * heads * min(BLOCK, recipe.data.row_length) * recipe.data.row_length


def _flops(recipe: Recipe, module: StageModule, teacher: PreTrainedModel | None) -> float:
    """Of a step's matrix multiplications: 2 a weight and token forward, 2 for its input's gradient, 2 for its own.

    Frozen weights need no gradient of their own; with activation checkpointing the forward pass is done twice. What is
    left out: attention scores, the optimizer, sampling and the teacher's answers.
    """
    per_token = 0.0
    head = module.student.get_output_embeddings()
    for part in _linears(module):
        if part is not head or module.wants.logits:
            again = 2 if recipe.activation_checkpointing and part is not head else 0
            per_token += part.weight.numel() * (4 + 2 * part.weight.requires_grad + again)
    if teacher is not None:
        skipped = None if module.teacher_wants.logits else teacher.get_output_embeddings()
        per_token += sum(2.0 * part.weight.numel() for part in _linears(teacher) if part is not skipped)
    return per_token * recipe.batch_size * recipe.accumulation * recipe.data.row_length


def _linears(model: nn.Module) -> Sequence[nn.Linear]:
    return [part for part in model.modules() if isinstance(part, nn.Linear)]


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
        table.add_row(f"stage {stage.name}", "", "", "", *(f"{n:,}" for n in (stage.trained, stage.adapters, stage.beside)))
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
            f"does not fit even on {COUNTS[-1]} GPUs of {size}: each needs {_gb(largest)} GB, and {budget} are counted on;"
            " lower batch_size (and raise accumulation), or set activation_checkpointing: true"
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
