"""`orin-kit distill`: a recipe to a student that stands on its own as a Hugging Face model directory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from orin_kit.data.augment import write_changes
from orin_kit.data.chat import Chat, read_chats
from orin_kit.distill.accelerate_setup import make_accelerator
from orin_kit.distill.accuracy import accuracy, held_out_loss
from orin_kit.distill.answers import teacher_answers
from orin_kit.distill.checkpoint import EVENTS, HEADS, LAYERS, LOG, CheckpointStore
from orin_kit.distill.continual import continued
from orin_kit.distill.dataset import Dataset, load_dataset, load_questions
from orin_kit.distill.pair import ANSWERS, Pair, check_convolutions, load_model, load_pair
from orin_kit.distill.recipe import Recipe
from orin_kit.distill.recipe_file import with_absolute_paths
from orin_kit.distill.report import build_report, report_table
from orin_kit.distill.report_html import write_html
from orin_kit.distill.stage_setup import check_stages
from orin_kit.distill.trainer import Trainer
from orin_kit.errors import UserError
from orin_kit.manifest import check_free, sha256_input, write_artifact
from orin_kit.models.weights import has_weights
from orin_kit.tokenizer import ChatTokenizer, copy_tokenizer

Scores = MutableMapping[str, dict[str, Any]]


def distill(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
    known_scores: Scores | None = None,
) -> dict[str, Any]:
    """Distil `recipe.teacher` into `recipe.student` and write a `model` artifact.

    The artifact: config.json, model.safetensors (fp16), the tokenizer's files, recipe.yaml, train.log.jsonl and
    tensorboard/, report.json and report.html with the curves, heads.json when attention was distilled, layers.json
    when layers were searched, answers.jsonl when the teacher answered questions, augmented.jsonl when chats were
    changed. Until it is complete, the training state lies in `.NAME.checkpoint` beside it; the same call goes on from
    there after a kill, and ends with the same bits.

    Args:
        recipe: see `Recipe.load`.
        out: the directory to write.
        overwrite: replace an existing artifact, and drop a checkpoint of another recipe.
        progress: show a bar (on a terminal) and print the table of scores.
        known_scores: scores of models that do not change between runs, filled and reused by `compare`.

    Returns:
        The content of report.json; nothing in the processes of `accelerate launch` that are not the first.

    Raises:
        UserError: recipe, data or tokenizers do not fit, `out` is taken, or a checkpoint is of another recipe.
        ArtifactError, UnsupportedModelError: a model directory is damaged or of an unknown family.
        TrainingDivergedError: the loss is no longer finite.
    """
    out, recipe = Path(out), continued(recipe)
    check_free(out, overwrite=overwrite)
    if not recipe.total_steps:
        raise UserError("stages: no stage has steps", mend="give at least one stage some steps")
    check_convolutions(recipe)
    accelerator = make_accelerator(recipe.precision)
    if recipe.stages.task.on_policy and accelerator.distributed_type == DistributedType.FSDP:
        mend = "start accelerate launch without --use_fsdp"
        raise UserError("stages.task.on_policy: a sharded student cannot generate", mend=mend)
    first = accelerator.is_main_process
    progress = progress and first
    store = open_store(recipe, out)
    if not overwrite:
        store.check()
    pair = load_pair(recipe)
    check_stages(recipe, pair)
    with accelerator.main_process_first():  # the others find what it has kept
        chats = answered(recipe, pair, store.answers, progress=progress)
        data = load_dataset(recipe, pair.tokenizer, chats, store.translations)
    trainer = Trainer(recipe, pair, data, store)
    with progress_bar(progress) as bar:
        task = bar.add_task("distill", total=recipe.total_steps)

        def advance(stage: str, done: int, loss: float) -> None:
            bar.update(task, completed=done, description=f"{stage}, loss {loss:.3f}")

        seconds = trainer.train(overwrite=overwrite, advance=advance)
    if not first:
        trainer.accelerator.wait_for_everyone()
        return {}
    pair.student.half().float()  # scored as it is shipped
    if not all(bool(p.isfinite().all()) for p in pair.student.parameters()):
        what = f"weights of the student are beyond fp16's range, {torch.finfo(torch.float16).max:g}"
        raise UserError(what, mend="train with a lower learning rate or more weight decay, with --overwrite")
    scores = _scores(recipe, pair, data, progress, {} if known_scores is None else known_scores)
    report = build_report(scores, store.log, seed=recipe.seed, seconds=seconds, items=len(data.test))
    _write(recipe, out, pair, data, store, report, overwrite=overwrite)
    store.remove()
    trainer.accelerator.wait_for_everyone()
    if progress:
        console = Console()
        console.print(report_table(report))
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return report


def open_store(recipe: Recipe, out: Path) -> CheckpointStore:
    """Where a run into `out` keeps its state, named by all that decides it."""
    asked = [[[message.role, message.content] for message in prompt] for prompt in load_questions(recipe)]
    contents = _contents(recipe)
    told = [asked, recipe.max_new_tokens, recipe.precision, contents.get("teacher")]
    return CheckpointStore(out, _identity(recipe, contents), _hash(told))


def run_identity(recipe: Recipe) -> str:
    """Hash of all that decides a run's weights: the recipe, and the content of the models and data it names."""
    return _identity(recipe, _contents(recipe))


def _identity(recipe: Recipe, contents: Mapping[str, str]) -> str:
    return _hash([recipe.sha256(), contents])


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _contents(recipe: Recipe) -> dict[str, str]:
    return {role: sha256_input(path) for role, path in recipe_inputs(recipe).items()}


def score(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    data: Dataset,
    recipe: Recipe,
    progress: bool,
    *,
    losses: bool = True,
) -> dict[str, Any]:
    """Parameters, exact match by kind of question (`accuracy`), and with `losses` `held_out_loss` in nats a token.

    With a general set, `general_accuracy` and `general_loss` as well.
    """
    tests = {"accuracy": data.test} | ({"general_accuracy": data.general.test} if data.general else {})
    watched = {"held_out_loss": data.watched} | ({"general_loss": data.general.watched} if data.general else {})
    found: dict[str, Any] = {"parameters": model.num_parameters()}
    with progress_bar(progress) as bar:
        task = bar.add_task("test questions", total=sum(map(len, tests.values())))
        for name, questions in tests.items():
            found[name] = accuracy(
                model, tokenizer, questions, max_new_tokens=recipe.max_new_tokens, batch_size=recipe.evaluation_batch,
                advance=lambda count: bar.advance(task, count),
            )  # fmt: skip
    if not losses:
        return found
    return found | {name: held_out_loss(model, rows, recipe.batch_size) for name, rows in watched.items()}


def answered(recipe: Recipe, pair: Pair, path: Path, *, progress: bool) -> list[Chat]:
    """The recipe's questions with the teacher's replies, kept in `path`."""
    prompts = load_questions(recipe)
    if not prompts:
        return []
    if recipe.teacher_logits and (recipe.teacher_logits / ANSWERS).is_file():
        wanted = set(prompts)  # what is held out now may not have been when the logits were stored
        return [chat for chat in read_chats(recipe.teacher_logits / ANSWERS) if chat[:-1] in wanted]
    device = make_accelerator(recipe.precision).device
    assert pair.teacher is not None
    with progress_bar(progress) as bar:
        task = bar.add_task("the teacher answers", total=len(prompts))
        return teacher_answers(
            pair.teacher.to(device), pair.teacher_tokenizer, prompts, path,
            max_new_tokens=recipe.max_new_tokens, batch_size=recipe.evaluation_batch,
            advance=lambda count: bar.advance(task, count),
        )  # fmt: skip


def _scores(recipe: Recipe, pair: Pair, data: Dataset, progress: bool, known: Scores) -> dict[str, dict[str, Any]]:
    """Teacher (unless it is the student before), the student as it was (when it had learned anything), and as it is."""
    device = make_accelerator(recipe.precision).device
    if "teacher" not in known and recipe.teacher is not None and pair.teacher is not None:
        rows = recipe.bridge == "none"  # they are of the student's tokens
        teacher = pair.teacher.to(device)
        known["teacher"] = score(teacher, pair.teacher_tokenizer, data, recipe, progress, losses=rows)
    if "start" not in known and has_weights(recipe.student):
        before = load_model(recipe.student).to(device)
        known["start"] = score(before, pair.tokenizer, data, recipe, progress)
    return {**known, "student": score(pair.student.to(device), pair.tokenizer, data, recipe, progress)}


def _write(
    recipe: Recipe,
    out: Path,
    pair: Pair,
    data: Dataset,
    store: CheckpointStore,
    report: dict[str, Any],
    *,
    overwrite: bool,
) -> None:
    settings = {"recipe": recipe.model_dump(mode="json"), "run": store.identity}
    with write_artifact(out, "model", inputs=recipe_inputs(recipe), settings=settings, overwrite=overwrite) as artifact:
        folder = artifact.directory
        pair.student.half().save_pretrained(folder, safe_serialization=True)
        copy_tokenizer(pair.tokenizer_directory, folder)
        (folder / "recipe.yaml").write_text(with_absolute_paths(recipe).to_yaml(), "utf-8")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        files = {LOG: store.log, HEADS: store.heads, LAYERS: store.layers, ANSWERS: store.answers}
        for name, file in files.items():
            if file.is_file():
                shutil.copy(file, folder / name)
        shutil.copytree(store.events, folder / EVENTS)
        if data.changes:
            write_changes(folder / "augmented.jsonl", data.changes)
        write_html(report, store.log, store.heads if store.heads.is_file() else None, folder / "report.html")
        artifact.results.update(report)


def recipe_inputs(recipe: Recipe) -> dict[str, Path]:
    """Everything on disk that decides a run's result, by role."""
    data = recipe.data
    named = {
        "teacher": None if recipe.teacher_logits else recipe.teacher or recipe.student,
        "student": recipe.student,
        "teacher_logits": recipe.teacher_logits,
        "chats": data.chats,
        "questions": data.questions.chats if data.questions else None,
        "general": data.general.chats if data.general else None,
        "there": data.back_translation.there if data.back_translation else None,
        "back": data.back_translation.back if data.back_translation else None,
    }
    return {role: path for role, path in named.items() if path is not None}


def progress_bar(shown: bool) -> Progress:
    """On stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
