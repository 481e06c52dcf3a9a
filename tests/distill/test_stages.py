"""Stages: what they read from both models, and that each one's own loss moves the student."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from orin_kit.data.packing import Example
from orin_kit.distill.dataset import to_tensors
from orin_kit.distill.heads import LayerHeads
from orin_kit.distill.logits import Dense
from orin_kit.distill.pair import Pair, load_pair
from orin_kit.distill.recipe import Attention, Exits, Features, Lora, Recipe, Task
from orin_kit.distill.signals import LiveTeacher, Signal, TensorBatch, Wants, read_signal
from orin_kit.distill.stages import (
    AttentionStage,
    FeatureStage,
    Knobs,
    RelationStage,
    ResidualProjection,
    StageModule,
    TaskStage,
    relation_heads,
)
from orin_kit.errors import UserError

KNOBS = Knobs(temperature=2.0, teacher_weight=0.7)
LAYERS, MATCHED = (0, 1), (1, 3)


@pytest.fixture
def pair(make_recipe: Callable[..., Recipe]) -> Pair:
    return load_pair(make_recipe())


@pytest.fixture
def batch() -> TensorBatch:
    """Rows of one, two and three chats, of different lengths."""
    rng = np.random.default_rng()
    lengths = [(20,), (6, 7), (2, 1, 2)]
    rows = [
        Example(rng.integers(0, 2048, sum(of)).tolist(), (rng.random(sum(of)) < 0.5).tolist(), of) for of in lengths
    ]
    return to_tensors(rows, torch.device("cpu"))


def features(pair: Pair, **fields: object) -> StageModule:
    stage = Features.model_validate({"task_weight": 0.0} | fields)
    return FeatureStage(pair.student, stage, Task(), LAYERS, MATCHED, 48, with_teacher=True)


def residual(pair: Pair) -> StageModule:
    return features(pair, projection="residual", embeddings=0.5, loss="cosine_mse")


def attention(pair: Pair) -> StageModule:
    heads = [LayerHeads(1, [0.1, 0.2, 0.3], [0, 1]), LayerHeads(3, [0.3, 0.2, 0.1], [1, 2])]
    return AttentionStage(pair.student, Attention(task_weight=0.0), Task(), LAYERS, MATCHED, heads, with_teacher=True)


def relations(pair: Pair) -> StageModule:
    stage, config = Attention(task_weight=0.0, mode="relations"), pair.teacher.config
    return RelationStage(pair.student, stage, Task(), LAYERS, MATCHED, config, with_teacher=True)


def task(pair: Pair) -> StageModule:
    return TaskStage(pair.student, Task(lora=None), with_teacher=True)


def reverse(pair: Pair) -> StageModule:
    return TaskStage(pair.student, Task(lora=None, divergence="reverse_kl"), with_teacher=True)


def exits(pair: Pair) -> StageModule:
    return TaskStage(pair.student, Task(lora=None, exits=Exits(layers=(0,), weight=1.0)), with_teacher=False)


def lora(pair: Pair) -> StageModule:
    return TaskStage(pair.student, Task(lora=Lora(dropout=0.0)), with_teacher=True)


def dora(pair: Pair) -> StageModule:
    return TaskStage(pair.student, Task(lora=Lora(dropout=0.0, dora=True)), with_teacher=True)


@pytest.mark.parametrize("build", [features, residual, attention, relations, task, reverse, exits, lora, dora])
def test_every_stages_own_loss_trains_the_student(
    build: Callable[[Pair], StageModule], pair: Pair, batch: TensorBatch
) -> None:
    before = {name: value.clone() for name, value in pair.student.state_dict().items()}
    module, teacher = build(pair), LiveTeacher(pair.teacher)
    signal = teacher(batch, module.teacher_wants)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(20):
        loss = module(batch, signal, KNOBS)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    module.finish()
    assert losses[-1] < losses[0]
    after = pair.student.state_dict()
    assert after.keys() == before.keys()  # adapters are gone, projections and mixers were never inside
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("q_proj.weight" in name for name in changed)
    if build in (lora, dora):
        assert all("q_proj.weight" in name or "v_proj.weight" in name for name in changed)


@pytest.mark.parametrize("build", [lora, dora])
def test_merged_adapters_compute_the_same(build: Callable[[Pair], StageModule], pair: Pair, batch: TensorBatch) -> None:
    module = build(pair)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted = logits_of(pair, batch)
    module.finish()
    torch.testing.assert_close(logits_of(pair, batch), adapted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def logits_of(pair: Pair, batch: TensorBatch) -> torch.Tensor:
    dense = read_signal(pair.student.eval(), batch, Wants(logits=True)).logits
    assert isinstance(dense, Dense)
    return dense.hidden @ dense.weight.T


def test_signals_are_transformers_own(pair: Pair, batch: TensorBatch) -> None:
    """Padding on the right, chats packed, and no mask: what each chat alone gives in the whole model."""
    signal = LiveTeacher(pair.teacher)(batch, Wants(hidden=(0, 3), embeddings=True, logits=True))
    assert isinstance(signal.logits, Dense) and signal.embeddings is not None
    logits = iter(signal.logits.hidden @ signal.logits.weight.T)
    for row, example in enumerate(batch.rows):
        start = 0
        for length in example.lengths:
            here = slice(start, start + length)
            with torch.no_grad():
                out = pair.teacher(input_ids=batch.input_ids[row : row + 1, here], output_hidden_states=True)
            for found, expected in zip((signal.embeddings, *signal.hidden), (0, 1, 4), strict=True):
                torch.testing.assert_close(found[row, here], out.hidden_states[expected][0], atol=1e-5, rtol=1e-4)
            for position in batch.asked[row, here].nonzero()[:, 0]:
                torch.testing.assert_close(next(logits), out.logits[0, position], atol=1e-5, rtol=1e-4)
            start += length
    assert next(logits, None) is None


def test_the_task_loss_is_shared_out(pair: Pair, batch: TensorBatch) -> None:
    module, teacher = task(pair), LiveTeacher(pair.teacher)
    parts = module(batch, teacher(batch, module.teacher_wants), KNOBS)
    assert float(parts["loss"].detach()) == pytest.approx(
        0.7 * float(parts["kd"].detach()) + 0.3 * float(parts["ce"].detach()), rel=1e-5
    )
    plain = TaskStage(pair.student, Task(lora=None), with_teacher=False)
    assert not plain.teacher_wants
    measured = module(batch, Signal(), KNOBS, measure=True)
    assert set(measured) == {"ce"}
    torch.testing.assert_close(measured["ce"], parts["ce"])


def test_a_residual_projection_begins_as_the_state_itself() -> None:
    x = torch.randn(2, 3, 8)
    wider, narrower = ResidualProjection(8, 12)(x), ResidualProjection(8, 5)(x)
    assert torch.equal(wider[..., :8], x) and not wider[..., 8:].any()
    assert torch.equal(narrower, x[..., :5])


def test_relation_heads_cut_every_width_evenly(pair: Pair) -> None:
    found = relation_heads(pair.student.config, pair.teacher.config)
    assert found == 2  # widths 32 and 32, 48 and 16; the student has two heads
    student = pair.student.config.to_dict() | {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128}
    teacher = student | {"num_attention_heads": 28, "num_key_value_heads": 4}
    configs = [type(pair.student.config)(**fields) for fields in (student, teacher)]
    assert relation_heads(*configs) == 8


def test_exits_are_the_models_own_early_predictions(pair: Pair, batch: TensorBatch) -> None:
    module = exits(pair)
    parts = module(batch, Signal(), Knobs(2.0, 0.0))
    with torch.no_grad():
        signal = read_signal(pair.student, batch, Wants(hidden=(0,), logits=True))
        assert isinstance(signal.logits, Dense)
        decoder = pair.student.get_decoder()
        early, last = (
            (x @ signal.logits.weight.T / 2.0).double().log_softmax(-1)
            for x in (decoder.norm(signal.hidden[0][batch.asked]), signal.logits.hidden)
        )
        expected = 4.0 * (last.exp() * (last - early)).sum(-1).mean()
    assert parts["alignment"].item() == pytest.approx(float(expected), rel=1e-3, abs=2e-6)
    with pytest.raises(UserError, match=r"stages\.task\.exits\.layers"):
        TaskStage(pair.student, Task(exits=Exits(layers=(1,))), with_teacher=False)


def test_noise_on_embeddings_is_for_training_alone(pair: Pair, batch: TensorBatch) -> None:
    quiet = logits_of(pair, batch)
    module = TaskStage(pair.student, Task(lora=None, neftune=5.0), with_teacher=False)
    assert torch.equal(logits_of(pair, batch), quiet)
    pair.student.train()
    noisy = [module(batch, Signal(), KNOBS)["ce"].item() for _ in range(2)]
    assert noisy[0] != noisy[1]
    module.finish()
    still = [module(batch, Signal(), KNOBS)["ce"].item() for _ in range(2)]
    assert still[0] == still[1]


def test_adapters_for_modules_that_do_not_exist(pair: Pair) -> None:
    with pytest.raises(UserError, match=r"stages\.task\.lora\.targets"):
        TaskStage(pair.student, Task(lora=Lora(targets=("no_such_proj",))), with_teacher=True)


@pytest.mark.parametrize("targets", [("q_proj", "v_prj"), ("lm_head",), ("q_proj", "lm_head")])
def test_every_target_must_be_there(pair: Pair, targets: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=rf"no linear {targets[-1]} to adapt.*q_proj"):
        TaskStage(pair.student, Task(lora=Lora(targets=targets)), with_teacher=True)


def test_all_linear(pair: Pair) -> None:
    module = TaskStage(pair.student, Task(lora=Lora(targets="all-linear")), with_teacher=True)
    adapted = {n.split(".lora_")[0] for n, p in module.named_parameters() if p.requires_grad}
    assert any("down_proj" in name for name in adapted)
    module.finish()
