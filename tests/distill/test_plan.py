"""The plan against what torch really holds: a stage's tensors, its optimizers' states, what autograd saves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orin_kit.distill.heads import LayerHeads
from orin_kit.distill.optimizers import make_optimizers
from orin_kit.distill.pair import load_pair
from orin_kit.distill.plan import Plan, plan, plan_table
from orin_kit.distill.recipe import Recipe, Stage
from orin_kit.distill.stage_plan import Memory
from orin_kit.distill.stages import AttentionStage, FeatureStage, RelationStage, StageModule, TaskStage
from orin_kit.errors import ArtifactError, UserError

CONFIGS = Path(__file__).parents[1] / "data/configs"
RECIPES = Path(__file__).parents[2] / "calibration/recipes"
QWEN = [f"teacher={CONFIGS / 'Qwen2.5-7B-Instruct'}", f"student={CONFIGS / 'Qwen2.5-1.5B-Instruct'}"]
LAYERS, MATCHED = (1,), (3,)  # of 2 and 4: the default upper half, at the same relative depth


def qwen(*overrides: str, name: str = "qwen2.5-7b-to-1.5b") -> Plan:
    return plan(Recipe.load(RECIPES / f"{name}.yaml", [*QWEN, *overrides]))


@pytest.fixture(scope="module")
def of_the_pair() -> Plan:
    return qwen()


def bytes_of(tensors: Any) -> int:
    """Of real tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def real_module(recipe: Recipe, stage: Stage, name: str) -> tuple[StageModule, PreTrainedModel]:
    """The stage on real weights, made without the run's builder."""
    pair = load_pair(recipe)
    teacher, task = pair.teacher, recipe.stages.task
    if name == "features":
        made: StageModule = FeatureStage(
            pair.student, stage, task, LAYERS, MATCHED, teacher.config.hidden_size, with_teacher=True
        )  # type: ignore[arg-type]
    elif name == "attention" and stage.mode == "relations":  # type: ignore[attr-defined]
        made = RelationStage(pair.student, stage, task, LAYERS, MATCHED, teacher.config, with_teacher=True)  # type: ignore[arg-type]
    elif name == "attention":
        heads = [LayerHeads(MATCHED[0], [0.2, 0.5, 0.1], [0, 2])]  # 60 % of three heads are two
        made = AttentionStage(pair.student, stage, task, LAYERS, MATCHED, heads, with_teacher=True)  # type: ignore[arg-type]
    else:
        made = TaskStage(pair.student, stage, with_teacher=True)  # type: ignore[arg-type]
    return made, teacher


CASES: dict[str, dict[str, Any]] = {
    "features": {"optimizer": "adamw"},
    "features-muon": {"optimizer": "muon"},
    "features-residual": {"stages": {"features": {"steps": 1, "projection": "residual", "embeddings": 0.5}}},
    "attention": {},
    "attention-relations": {"stages": {"attention": {"steps": 1, "mode": "relations"}}},
    "task": {},
    "task-dora": {"stages": {"task": {"steps": 1, "lora": {"targets": "all-linear", "dora": True}}}},
    "task-muon": {"optimizer": "muon", "stages": {"task": {"steps": 1, "lora": None}}},
}


@pytest.mark.parametrize("case", CASES)
def test_weights_gradients_and_optimizer_states_are_what_torch_holds_after_a_step(
    case: str, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(**CASES[case], precision="bf16", ema=0.9)
    name = case.partition("-")[0]
    planned = next(stage for stage in plan(recipe).stages if stage.name == name)
    stage = dict(recipe.running_stages())[name]
    module, teacher = real_module(recipe, stage, name)
    trained = [p for p in module.parameters() if p.requires_grad]
    sum(p.double().square().sum() for p in trained).backward()  # type: ignore[union-attr]
    optimizers = make_optimizers(module, stage, recipe)
    for optimizer in optimizers:
        optimizer.step()
    states = [v for o in optimizers for state in o.state.values() for v in state.values() if isinstance(v, Tensor)]

    assert planned.memory.student == bytes_of([*module.parameters(), *module.buffers()])
    assert planned.memory.gradients == bytes_of(p.grad for p in trained)
    assert planned.memory.optimizer == bytes_of(states)
    assert planned.memory.average == bytes_of(trained)
    assert planned.memory.teacher == bytes_of([*teacher.parameters(), *teacher.buffers()])
    assert planned.trained == sum(p.numel() for p in trained)


# --- activations -----------------------------------------------------------------------------------------------------

TINY = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_hidden_layers=4, vocab_size=512, max_position_embeddings=128, tie_word_embeddings=True)  # fmt: skip


def only_configs(home: Path, family: str, **fields: Any) -> Path:
    config = AutoConfig.for_model(family, **TINY | fields)
    config.architectures = [{"qwen2": "Qwen2ForCausalLM", "lfm2": "Lfm2ForCausalLM"}[family]]
    config.save_pretrained(home)
    return home


def recipe_of(home: Path, **fields: Any) -> Recipe:
    stages = {"features": None, "attention": None, "task": {"steps": 1, "lora": None}}
    data = {"chats": "absent.jsonl", "row_length": 48}
    base = {"teacher": str(home), "student": str(home), "batch_size": 3, "data": data, "stages": stages}
    return Recipe.parse(base | fields)


def really_saved(model: nn.Module, recipe: Recipe) -> int:
    """What autograd saves in a real forward pass with packed rows, parameters excepted."""
    found: dict[int, Tensor] = {}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            found[place] = tensor  # alive, so that its place is not given to another
        return tensor

    rows, length = recipe.batch_size, recipe.data.row_length
    positions = torch.arange(length // 2).repeat(2).repeat(rows, 1)  # two chats a row
    lower = torch.autocast("cpu", torch.bfloat16) if recipe.precision == "bf16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), lower:
        ids = torch.randint(0, 512, (rows, length))
        model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)  # type: ignore[operator]
    return bytes_of(found.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_saved_activations_are_what_autograd_saves(family: str, precision: str, tmp_path: Path) -> None:
    fields = dict(conv_L_cache=4, full_attn_idxs=[], use_cache=False) if family == "lfm2" else {}
    home = only_configs(tmp_path, family, **fields)
    recipe = recipe_of(home, precision=precision)
    (stage,) = plan(recipe).stages
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home), dtype=torch.float32).train()
    real = really_saved(model, recipe)
    # The plan adds one layer, for the gradients on their way down: of four alike, a quarter.
    largest = stage.activations_kept - (stage.activations_kept * 4) // 5
    planned = stage.activations_kept - largest + stage.memory.copies
    assert planned == pytest.approx(real, rel=0.02)


def test_activations_follow_the_papers_sum(tmp_path: Path) -> None:
    """Per layer, token and in fp32: 24 hidden, 16 queries, 16 intermediate (arXiv:2205.05198 for a gated MLP and SDPA).

    Norms keep their input and their normed input, linears theirs; SDPA its three inputs (keys and values repeated to
    the queries' width) and its output; the MLP gate, its activation, up, and their product. All in four bytes.
    """
    recipe = recipe_of(only_configs(tmp_path, "qwen2"))
    (stage,) = plan(recipe).stages
    tokens = recipe.batch_size * recipe.data.row_length
    hidden, queries, inner, layers = 64, 64, 192, 4
    by_hand = tokens * (24 * hidden + 16 * queries + 16 * inner)
    assert stage.activations_kept == pytest.approx((layers + 1) * by_hand, rel=0.15)
    # Recomputed: what enters each layer, and one layer with its gradients.
    assert stage.activations_recomputed == pytest.approx(layers * tokens * hidden * 4 + 2 * by_hand, rel=0.15)


def test_checkpointing_changes_which_activations_count_and_the_work(tmp_path: Path) -> None:
    home = only_configs(tmp_path, "qwen2")
    kept, again = (plan(recipe_of(home, activation_checkpointing=on)).stages[0] for on in (False, True))
    assert (kept.memory.activations, again.memory.activations) == (kept.activations_kept, kept.activations_recomputed)
    assert again.memory.activations < kept.memory.activations / 2
    assert kept.flops < again.flops < 4 / 3 * kept.flops


# --- the real pair ---------------------------------------------------------------------------------------------------


def test_parameters_of_the_real_pair(of_the_pair: Plan) -> None:
    assert of_the_pair.teacher.total == 7_615_616_512
    assert of_the_pair.student.total == 1_543_714_304
    assert of_the_pair.teacher.head == of_the_pair.teacher.embedding == 152064 * 3584
    assert (of_the_pair.student.embedding, of_the_pair.student.head) == (151936 * 1536, 0)
    features, attention, task = of_the_pair.stages
    assert features.beside == 4 * (1536 * 3584 + 3584)
    assert attention.beside == 4 * 17 * 12  # 60 % of 28 heads, each a mixture of 12
    # LoRA of rank 16 on q (1536 to 1536) and v (1536 to 256).
    assert task.trained == task.adapters == 28 * 16 * (1536 + 1536 + 1536 + 256)


def test_memory_and_work_of_the_real_pair(of_the_pair: Plan) -> None:
    features, _, task = of_the_pair.stages
    assert features.memory.teacher == pytest.approx(2 * 7_615_616_512, rel=1e-4)
    assert features.memory.student == pytest.approx(4 * features.trained, rel=1e-4)
    assert features.memory.optimizer == pytest.approx(8 * features.trained, rel=1e-4)
    assert task.memory.optimizer == pytest.approx(8 * task.trained, rel=1e-3)
    assert of_the_pair.gpus == 1
    tokens = 4 * 4 * 1024
    assert of_the_pair.step_tokens == tokens
    matrices = 1_543_714_304 + features.beside
    teacher = 7_615_616_512 - 152064 * 3584  # its embedding is looked up, not multiplied
    assert features.flops == pytest.approx(tokens * (6 * matrices + 2 * teacher), rel=1e-3)
    frozen = tokens * (4 * 1_543_714_304 + 6 * task.trained + 2 * teacher)
    assert task.flops == pytest.approx(frozen, rel=1e-3)
    text = render(of_the_pair)
    assert "7,615,616,512" in text and "1,543,714,304" in text and "GPUs needed: 1 of 80 GB" in text


def test_fewer_bytes_need_more_gpus_until_the_teacher_alone_is_too_much(of_the_pair: Plan) -> None:
    roomy, small, tiny = (replace(of_the_pair, gpu_bytes=size * 10**9) for size in (80, 50, 16))
    assert roomy.gpus == 1
    assert small.gpus is not None and small.gpus > 1
    assert max(small.memory(stage, small.gpus).total for stage in small.stages) <= small.budget
    assert max(small.memory(stage, small.gpus // 2).total for stage in small.stages) > small.budget
    assert tiny.gpus is None
    assert "does not fit" in render(tiny)


def test_fsdp_shards_the_student_alone(of_the_pair: Plan) -> None:
    stage = of_the_pair.stages[0]
    one, eight = of_the_pair.memory(stage, 1), of_the_pair.memory(stage, 8)
    for name in ("student", "gradients", "optimizer"):
        assert getattr(eight, name) == -(-getattr(one, name) // 8)
    assert (eight.teacher, eight.activations, eight.logits) == (one.teacher, one.activations, one.logits)
    # With accumulation, gradients wait unsharded in bf16.
    assert eight.gathered > 2 * stage.trained
    assert isinstance(one, Memory) and one.total > eight.total


def test_a_teacher_on_disk_costs_nothing(of_the_pair: Plan) -> None:
    off = ["stages.features=null", "stages.attention=null"]
    (stored,) = qwen(*off, "teacher_logits=cache").stages
    task = of_the_pair.stages[-1]
    assert (stored.memory.teacher, stored.memory.signal) == (0, 0)
    assert stored.flops < task.flops / 2


@pytest.mark.parametrize("name", ["domain-medical", "qwen2.5-7b-to-1.5b-8gpu"])
def test_the_other_recipes_of_the_pair_fit(name: str) -> None:
    # The alignment stages of the pair are planned above; here the task stage is what differs.
    found = qwen("stages.attention=null", "stages.features=null", name=name)
    assert found.gpus is not None and found.gpus <= 8


@pytest.mark.parametrize("name", ["self", "conv"])
def test_demo_recipes_can_be_planned(name: str) -> None:
    found = plan(Recipe.load(RECIPES / f"{name}.yaml"))
    assert found.gpus == 1 and all(stage.memory.total < 2e9 for stage in found.stages)


@pytest.mark.parametrize("extra", [{"neftune": 5.0}, {"exits": {"layers": [1]}}, {"on_policy": {"share": 0.5}}])
def test_every_kind_of_task_stage_can_be_planned(extra: dict[str, Any], tmp_path: Path) -> None:
    home = only_configs(tmp_path, "qwen2")
    plain = plan(recipe_of(home)).stages[0]
    stages = {"features": None, "attention": None, "task": {"steps": 1, "lora": None, **extra}}
    found = plan(recipe_of(home, stages=stages)).stages[0]
    assert found.memory.total >= plain.memory.total


def test_nothing_but_config_json_is_needed_and_that_is_needed(tmp_path: Path) -> None:
    assert not any(CONFIGS.glob("*/*token*")) and not any(CONFIGS.glob("*/*.safetensors"))
    shutil.copytree(CONFIGS / "Qwen2.5-1.5B-Instruct", tmp_path / "t")
    (tmp_path / "empty").mkdir()
    recipe = Recipe.load(
        RECIPES / "qwen2.5-7b-to-1.5b.yaml", [f"teacher={tmp_path / 't'}", f"student={tmp_path / 'empty'}"]
    )
    with pytest.raises(ArtifactError, match=r"config\.json"):
        plan(recipe)


def test_layers_the_student_does_not_have_are_named() -> None:
    with pytest.raises(UserError, match=r"stages\.features\.layers.*28"):
        qwen("stages.features.layers=[6, 28]")


def render(of: Plan) -> str:
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(plan_table(of))
    return console.export_text()
