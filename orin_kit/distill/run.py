"""`orin-kit distill`: a recipe to a student that stands on its own as a Hugging Face model directory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from orin_kit.data.chat import Chat
from orin_kit.distill.accuracy import accuracy, held_out_loss
from orin_kit.distill.answers import teacher_answers
from orin_kit.distill.checkpoint import HEADS, LOG, CheckpointStore
from orin_kit.distill.dataset import Dataset, load_dataset, load_questions
from orin_kit.distill.pair import Pair, load_model, load_pair
from orin_kit.distill.recipe import Recipe
from orin_kit.distill.report import build_report, report_table
from orin_kit.distill.trainer import Trainer, make_accelerator
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

    The artifact: config.json, model.safetensors (fp16), the tokenizer's files, recipe.yaml, train.log.jsonl,
    report.json, heads.json when attention was distilled, answers.jsonl when the teacher answered questions. Until it
    is complete, the training state lies in `.NAME.checkpoint` beside it; the same call goes on from there after a
    kill, and ends with the same bits.

    Args:
        recipe: see `Recipe.load`.
        out: the directory to write.
        overwrite: replace an existing artifact, and drop a checkpoint of another recipe.
        progress: show a bar (on a terminal) and print the table of scores.
        known_scores: scores of models that do not change between runs, filled and reused by `compare`.

    Returns:
        The content of report.json.

    Raises:
        UserError: recipe, data or tokenizers do not fit, `out` is taken, or a checkpoint is of another recipe.
        ArtifactError, UnsupportedModelError: a model directory is damaged or of an unknown family.
        TrainingDivergedError: the loss is no longer finite.
    """
    out = Path(out)
    check_free(out, overwrite=overwrite)
    pair = load_pair(recipe.teacher, recipe.student, precision=recipe.precision, seed=recipe.seed)
    if not recipe.total_steps:
        raise UserError("stages: no stage has steps", mend="give at least one stage some steps")
    store = CheckpointStore(out, run_identity(recipe))
    data = load_dataset(recipe, pair.tokenizer, _answered(recipe, pair, store, progress))
    trainer = Trainer(recipe, pair, data, store)
    with _progress(progress) as bar:
        task = bar.add_task("distill", total=recipe.total_steps)

        def advance(stage: str, done: int, loss: float) -> None:
            bar.update(task, completed=done, description=f"{stage}, loss {loss:.3f}")

        seconds = trainer.train(overwrite=overwrite, advance=advance)
    pair.student.half().float()  # scored as it is shipped
    scores = _scores(recipe, pair, data, progress, {} if known_scores is None else known_scores)
    report = build_report(scores, store.log, seed=recipe.seed, seconds=seconds, items=len(data.test))
    _write(recipe, out, pair, store, report, overwrite=overwrite)
    store.remove()
    if progress:
        console = Console()
        console.print(report_table(report))
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return report


def run_identity(recipe: Recipe) -> str:
    """Hash of all that decides a run's result: the recipe, and the content of the models and data it names."""
    digest = hashlib.sha256(recipe.sha256().encode())
    for path in _inputs(recipe).values():
        digest.update(sha256_input(path).encode())
    return digest.hexdigest()


def score(
    model: PreTrainedModel, tokenizer: ChatTokenizer, data: Dataset, recipe: Recipe, progress: bool
) -> dict[str, Any]:
    """Parameters, exact match by kind of question (`accuracy`), and `held_out_loss` in nats a token."""
    with _progress(progress) as bar:
        task = bar.add_task("test questions", total=len(data.test))
        found = accuracy(
            model, tokenizer, data.test, max_new_tokens=recipe.max_new_tokens, batch_size=recipe.evaluation_batch,
            advance=lambda count: bar.advance(task, count),
        )  # fmt: skip
    return {
        "parameters": model.num_parameters(),
        "accuracy": found,
        "held_out_loss": held_out_loss(model, data.watched, recipe.batch_size),
    }


def _answered(recipe: Recipe, pair: Pair, store: CheckpointStore, progress: bool) -> list[Chat]:
    """The recipe's questions with the teacher's replies."""
    prompts = load_questions(recipe)
    if not prompts:
        return []
    with _progress(progress) as bar:
        task = bar.add_task("the teacher answers", total=len(prompts))
        return teacher_answers(
            pair.teacher.to(make_accelerator(recipe.precision).device), pair.tokenizer, prompts, store.answers,
            max_new_tokens=recipe.max_new_tokens, batch_size=recipe.evaluation_batch,
            advance=lambda count: bar.advance(task, count),
        )  # fmt: skip


def _scores(recipe: Recipe, pair: Pair, data: Dataset, progress: bool, known: Scores) -> dict[str, dict[str, Any]]:
    """Teacher, the student as it was (when it had learned anything), and as it is."""
    if "teacher" not in known:
        known["teacher"] = score(pair.teacher, pair.tokenizer, data, recipe, progress)
    if "start" not in known and has_weights(recipe.student):
        before = load_model(recipe.student).to(pair.student.device)
        known["start"] = score(before, pair.tokenizer, data, recipe, progress)
    return {**known, "student": score(pair.student, pair.tokenizer, data, recipe, progress)}


def _write(
    recipe: Recipe, out: Path, pair: Pair, store: CheckpointStore, report: dict[str, Any], *, overwrite: bool
) -> None:
    settings = {"recipe": recipe.model_dump(mode="json"), "run": store.identity}
    with write_artifact(out, "model", inputs=_inputs(recipe), settings=settings, overwrite=overwrite) as artifact:
        folder = artifact.directory
        pair.student.half().save_pretrained(folder, safe_serialization=True)
        copy_tokenizer(pair.tokenizer_directory, folder)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        for file, name in ((store.log, LOG), (store.heads, HEADS), (store.answers, "answers.jsonl")):
            if file.is_file():
                shutil.copy(file, folder / name)
        artifact.results.update(report)


def _inputs(recipe: Recipe) -> dict[str, Path]:
    questions = recipe.data.questions
    files = {"chats": recipe.data.chats, "questions": questions.chats if questions else None}
    named = {role: path for role, path in files.items() if path is not None}
    return {"teacher": recipe.teacher, "student": recipe.student, **named}


def _progress(shown: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
