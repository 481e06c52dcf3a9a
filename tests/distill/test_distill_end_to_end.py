"""The verb: an artifact that transformers loads, a report that is true, and the comparison over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orin_kit.data.chat import Message, write_chats
from orin_kit.data.scoring import exact_match
from orin_kit.data.tasks import distinct
from orin_kit.distill import Recipe, compare, comparison, distill
from orin_kit.distill.accuracy import accuracy, answer, held_out_loss
from orin_kit.distill.dataset import load_dataset
from orin_kit.distill.pair import load_model
from orin_kit.errors import UserError
from orin_kit.manifest import read_manifest
from orin_kit.models.spec import read_spec
from orin_kit.tokenizer import ChatTokenizer


def test_the_artifact_is_a_hugging_face_model(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, out = make_recipe(precision="bf16"), tmp_path / "student"
    report = distill(recipe, out, progress=False)
    manifest = read_manifest(out, "model", verify=True)
    assert {"heads.json", "recipe.yaml", "report.json", "train.log.jsonl", "tokenizer.json"} <= manifest.files.keys()
    assert manifest.inputs.keys() == {"teacher", "student"}
    assert read_spec(out) == read_spec(recipe.student)
    assert all(t.dtype == torch.float16 for t in load_file(out / "model.safetensors").values())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == ChatTokenizer(out).encode_chat([Message("user", "Hi")], reply=True)
    assert model.generation_config.eos_token_id == sorted(ChatTokenizer(out).stop_ids, reverse=True) or set(
        model.generation_config.eos_token_id
    ) == set(ChatTokenizer(out).stop_ids)
    assert json.loads((out / "report.json").read_text()) == report == manifest.results
    assert set(report["models"]) == {"teacher", "start", "student"}
    assert list(report["stages"]) == ["features", "attention", "task"]
    assert Recipe.load(out / "recipe.yaml") == recipe


def test_scores_are_those_of_the_shipped_model(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, out = make_recipe(), tmp_path / "student"
    report = distill(recipe, out, progress=False)
    data = load_dataset(recipe, ChatTokenizer(out))
    loss = held_out_loss(load_model(out), data.watched, 7)
    assert report["models"]["student"]["held_out_loss"] == pytest.approx(loss, rel=1e-5)


def test_accuracy_against_one_question_at_a_time(
    make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path]
) -> None:
    """Batches padded on the left answer as single prompts do, and hits are counted by kind."""
    tokenizer, model = ChatTokenizer(pair_dirs[1]), load_model(pair_dirs[1])
    questions = load_dataset(make_recipe(test_items=13), tokenizer).test
    prompts = [tokenizer.encode_chat(q.prompt, reply=True) for q in questions]
    single = [answer(model, [p], tokenizer.stop_ids, 6)[0] for p in prompts]
    assert answer(model, prompts, tokenizer.stop_ids, 6) == single
    # Every second question gets the model's own reply as the right answer.
    asked = [
        type(q)(q.kind, q.prompt, tokenizer.decode(reply) if i % 2 else "no such answer")
        for i, (q, reply) in enumerate(zip(questions, single, strict=True))
    ]
    expected = [exact_match(tokenizer.decode(r), q.answer) for q, r in zip(asked, single, strict=True)]
    found = accuracy(model, tokenizer, asked, max_new_tokens=6, batch_size=4)
    assert found["all"] == pytest.approx(sum(expected) / len(expected))
    assert found.keys() == {"all", *(q.kind for q in asked)}


def test_users_chats_and_a_newborn_student(
    make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    newborn = tmp_path / "newborn"
    newborn.mkdir()
    (newborn / "config.json").write_text((pair_dirs[1] / "config.json").read_text())
    write_chats(tmp_path / "c.jsonl", [task.chat() for task in distinct("train", 0, 40)])
    recipe = make_recipe(student=str(newborn), data={"chats": str(tmp_path / "c.jsonl"), "row_length": 64})
    report = distill(recipe, tmp_path / "out", progress=False)
    assert set(report["models"]) == {"teacher", "student"}
    assert report["models"]["student"]["accuracy"].keys() == {"chats", "all"}
    assert "chats" in read_manifest(tmp_path / "out", "model").inputs


def test_fp16_needs_a_gpu(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        distill(make_recipe(precision="fp16"), tmp_path / "out", progress=False)


def test_no_steps_at_all(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stage has steps"):
        distill(make_recipe(stages={"features": None, "attention": None, "task": {"steps": 0}}), tmp_path / "out")


def test_learning_by_heart(make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path], tmp_path: Path) -> None:
    """The loop really trains: plain cross-entropy on a few chats comes close to zero."""
    write_chats(tmp_path / "c.jsonl", [task.chat() for task in distinct("train", 0, 6)])
    task = {"steps": 60, "learning_rate": 1e-2, "lora": None, "teacher_weight": {"start": 0.0, "every": 0}}
    recipe = make_recipe(
        data={"chats": str(tmp_path / "c.jsonl"), "row_length": 128},
        stages={"features": None, "attention": None, "task": task},
        optimizer="muon",
    )
    report = distill(recipe, tmp_path / "out", progress=False)
    assert report["stages"]["task"]["first_loss"] > 5
    assert report["final_loss"] < 1


def test_compare(make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = make_recipe(), tmp_path / "compared"
    result = compare(recipe, out, seeds=2, progress=False)
    assert json.loads((out / "compare.json").read_text()) == result
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert set(result["summary"]) == {"teacher", "start", "plain", "distilled", "gain"}
    for name in ("plain", "distilled", "seed-1/plain", "seed-1/distilled"):
        read_manifest(out / name, "model", verify=True)
    logs = {role: (out / role / "train.log.jsonl").read_text() for role in ("plain", "distilled")}
    assert "kd" not in logs["plain"] and "kd" in logs["distilled"]
    assert (out / "plain/model.safetensors").read_bytes() != (out / "distilled/model.safetensors").read_bytes()
    # What is complete is not run again; more seeds are added to it.
    monkeypatch.setattr(comparison, "distill", lambda *_, **__: pytest.fail("ran again"))
    assert compare(recipe, out, seeds=2, progress=False)["summary"] == result["summary"]
    with pytest.raises(pytest.fail.Exception):
        compare(recipe, out, seeds=3, progress=False)


def test_compare_summary() -> None:
    from orin_kit.distill.report import compare_summary

    shares = {"plain": (0.2, 0.4), "distilled": (0.5, 0.9)}
    runs = [{"models": {k: {"accuracy": {"all": v[i]}} for k, v in shares.items()}} for i in range(2)]
    summary = compare_summary(runs)
    assert summary["plain"]["all"] == pytest.approx({"mean": 0.3, "std": 0.02**0.5})
    assert summary["gain"]["all"] == pytest.approx({"mean": 0.4, "std": 0.02**0.5})
