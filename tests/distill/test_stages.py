"""Stages: what they read from both models, and that each one's own loss moves the student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orin_kit.distill.heads import LayerHeads
from orin_kit.distill.pair import Pair, load_pair
from orin_kit.distill.recipe import Attention, Features, Lora, Task
from orin_kit.distill.signals import LiveTeacher, TensorBatch, Wants, read_signal
from orin_kit.distill.stages import (
    AttentionStage,
    FeatureStage,
    HeadMixing,
    Knobs,
    StageModule,
    TaskStage,
    choose_layers,
    match_layers,
)
from orin_kit.errors import UserError

KNOBS = Knobs(temperature=2.0, teacher_weight=0.7)
TEACHER_DEPTH = 4


@pytest.fixture
def pair(pair_dirs: tuple[Path, Path]) -> Pair:
    return load_pair(*pair_dirs, precision="fp32", seed=0)


@pytest.fixture
def batch() -> TensorBatch:
    ids = torch.randint(0, 2048, (3, 20))
    mask = torch.arange(20)[None] < torch.tensor([20, 13, 5])[:, None]
    asked = mask & (torch.rand(3, 20) < 0.4)
    return TensorBatch(ids.where(mask, 0), mask, asked, torch.randint(0, 2048, (int(asked.sum()),)))


def features(pair: Pair) -> StageModule:
    stage = Features(layers=(0, 1), task_weight=0.0)
    return FeatureStage(pair.student, stage, TEACHER_DEPTH, pair.teacher.config.hidden_size, with_teacher=True)


def attention(pair: Pair) -> StageModule:
    heads = [LayerHeads(1, [0.1, 0.2, 0.3], [0, 1]), LayerHeads(3, [0.3, 0.2, 0.1], [1, 2])]
    stage = Attention(layers=(0, 1), task_weight=0.0)
    return AttentionStage(pair.student, stage, heads, TEACHER_DEPTH, with_teacher=True)


def task(pair: Pair) -> StageModule:
    return TaskStage(pair.student, Task(), None, with_teacher=True)


def lora(pair: Pair) -> StageModule:
    return TaskStage(pair.student, Task(), Lora(dropout=0.0), with_teacher=True)


@pytest.mark.parametrize("build", [features, attention, task, lora])
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
    if build is lora:
        assert all("q_proj.weight" in name or "v_proj.weight" in name for name in changed)


def test_merged_adapters_compute_the_same(pair: Pair, batch: TensorBatch) -> None:
    module = lora(pair)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted = read_signal(pair.student.eval(), batch, Wants(logits=True)).logits
    module.finish()
    merged = read_signal(pair.student.eval(), batch, Wants(logits=True)).logits
    assert adapted is not None and merged is not None
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def test_signals_are_transformers_own(pair: Pair, batch: TensorBatch) -> None:
    """Padding on the right and no mask: real positions are what a masked run of the whole model gives."""
    wants = Wants(hidden=(0, 3), attention=(1, 2), logits=True)
    signal = LiveTeacher(pair.teacher)(batch, wants)
    with torch.no_grad():
        out = pair.teacher(
            input_ids=batch.input_ids,
            attention_mask=batch.mask.long(),
            output_hidden_states=True,
            output_attentions=True,
        )
    torch.testing.assert_close(signal.hidden[0][batch.mask], out.hidden_states[1][batch.mask])
    torch.testing.assert_close(signal.hidden[1][batch.mask], out.hidden_states[4][batch.mask])
    for found, layer in zip(signal.attention, wants.attention, strict=True):
        torch.testing.assert_close(found.transpose(1, 2)[batch.mask], out.attentions[layer].transpose(1, 2)[batch.mask])
    torch.testing.assert_close(signal.logits, out.logits[batch.asked])


def test_the_task_loss_is_shared_out(pair: Pair, batch: TensorBatch) -> None:
    module, teacher = task(pair), LiveTeacher(pair.teacher)
    parts = module(batch, teacher(batch, module.teacher_wants), KNOBS)
    assert float(parts["loss"].detach()) == pytest.approx(
        0.7 * float(parts["kd"].detach()) + 0.3 * float(parts["ce"].detach()), rel=1e-5
    )
    plain = TaskStage(pair.student, Task(), None, with_teacher=False)
    assert not plain.teacher_wants


def test_head_mixing_keeps_distributions() -> None:
    mixing = HeadMixing(5, kept=[0, 2, 3], teacher_heads=4)
    torch.nn.init.normal_(mixing.scores, std=3.0)
    maps = torch.rand(2, 5, 7, 7).softmax(-1)
    mixed = mixing(maps)
    assert mixed.shape == (2, 3, 7, 7)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(2, 3, 7))
    weights = np.exp(mixing.scores.detach().double().numpy())
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("kh,bhqs->bkqs", weights, maps.double().numpy())
    np.testing.assert_allclose(mixed.detach().numpy(), expected, rtol=1e-5)


def test_layers() -> None:
    assert choose_layers(None, 28, "f") == (6, 7, 8, 9)
    assert choose_layers(None, 8, "f") == (6, 7)
    assert choose_layers(None, 4, "f") == (2, 3)
    assert choose_layers((0, 27), 28, "f") == (0, 27)
    assert match_layers((0, 13, 27), 28, 28) == (0, 13, 27)
    assert match_layers((0, 5, 11), 12, 24) == (1, 11, 23)
    assert match_layers((0, 1), 2, 1) == (0, 0)
    for wrong in ((28,), (-1,), ()):
        with pytest.raises(UserError, match=r"stages\.features\.layers"):
            choose_layers(wrong, 28, "stages.features.layers")


def test_adapters_for_modules_that_do_not_exist(pair: Pair) -> None:
    with pytest.raises(UserError, match=r"stages\.task\.lora\.targets"):
        TaskStage(pair.student, Task(), Lora(targets=("no_such_proj",)), with_teacher=True)


def test_all_linear(pair: Pair) -> None:
    module = TaskStage(pair.student, Task(), Lora(targets="all-linear"), with_teacher=True)
    adapted = {n.split(".lora_")[0] for n, p in module.named_parameters() if p.requires_grad}
    assert any("down_proj" in name for name in adapted)
    module.finish()
