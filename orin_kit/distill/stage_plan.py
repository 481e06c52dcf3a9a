"""What one stage of a recipe holds in memory and computes: the parts of `plan.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orin_kit.distill.activations import Kept, autocast, count_saved, on_fake_cpu, tensor_bytes
from orin_kit.distill.attention import BLOCK
from orin_kit.distill.logits import CHUNK_BYTES
from orin_kit.distill.optimizers import make_optimizers
from orin_kit.distill.pair import DTYPES
from orin_kit.distill.recipe import Recipe, Stage
from orin_kit.distill.signals import Signal, TensorBatch, Wants, read_signal
from orin_kit.distill.stage_setup import StageBuilder
from orin_kit.distill.stages import AttentionStage, Knobs, RelationStage, StageModule, TaskStage

LIVE_CHUNKS = 5  # tensors of a chunk's logits that live at once (`logits.py`)


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
        layer_bytes, rest_bytes: what FSDP gathers at once, in fp32: two decoder layers, and everything outside of them.
        trained_bytes: of gradients.
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


def stage_plan(recipe: Recipe, name: str, stage: Stage, builder: StageBuilder) -> StagePlan:
    """Count one stage.

    Args:
        recipe: the whole.
        name: of the stage.
        stage: its section of the recipe.
        builder: builds it; its models are on the meta device, and are left as the stage leaves them (adapters in).
    """
    with torch.device("meta"):
        module = builder.build(stage).train()
    assert builder.pair.teacher is not None
    teacher, student = builder.pair.teacher, builder.pair.student
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    held = [*module.parameters(), *module.buffers()]
    layers = list(student.get_decoder().layers)
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
        layer_bytes=2 * max(in_layers) * 4,
        rest_bytes=(whole - sum(in_layers)) * 4,
        trained_bytes=tensor_bytes(trained.values()),
        flops=_flops(recipe, module, teacher if wanted else None),
    )


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
    return tensor_bytes(_tensors(signal)) + (int(last) if wants.logits else 0)


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
    held = head.numel() * width if width < 4 else 0
    return int(LIVE_CHUNKS * chunk + held + sweeps * (gradients + states * width))


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
    return int(4 * recipe.batch_size * heads * min(BLOCK, recipe.data.row_length) * recipe.data.row_length)


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
