"""`orin-kit cache`: a recipe's teacher, run once over the training rows, to logits that training reads from disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from orin_kit.data.packing import Example
from orin_kit.distill.accelerate_setup import make_accelerator
from orin_kit.distill.continual import continued
from orin_kit.distill.dataset import load_dataset
from orin_kit.distill.pair import Pair, load_pair
from orin_kit.distill.recipe import Recipe
from orin_kit.distill.run import answered, progress_bar, recipe_inputs
from orin_kit.distill.signals import LiveTeacher
from orin_kit.distill.teacher_logits import (
    KIND,
    SHARD_BYTES,
    asked_positions,
    default_temperatures,
    row_key,
    vocabulary_digest,
    write_logits,
)
from orin_kit.errors import UserError
from orin_kit.manifest import check_free, sha256_input, write_artifact

IDENTITY, ANSWERS = "identity", "answers.jsonl"


def cache(
    recipe: Recipe,
    out: Path,
    *,
    k: int = 64,
    temperatures: Sequence[float] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Run `recipe.teacher` over every training row and write a `logits` artifact, for `recipe.teacher_logits`.

    The artifact: logits-*.safetensors (`teacher_logits.py` says what is in them), and answers.jsonl when the teacher
    answered questions. Until it is complete, the finished shards lie in `.NAME.logits-partial` beside it; the same
    call goes on from there after a kill, and ends with the same bytes.

    Args:
        recipe: its teacher, data, seed, precision and batch size count; rows to rehearse are stored as well.
        out: the directory to write.
        k: tokens kept at a position.
        temperatures: at which the mass of all others is recorded; what the recipe's schedule passes when None.
        overwrite: replace an existing artifact, and drop what another call left unfinished.
        progress: show a bar (on a terminal) and say what was written.
        shard_bytes: no shard is larger, unless one row is.

    Returns:
        `rows`, asked `positions`, `bytes`, and `bytes_per_position`.

    Raises:
        UserError: recipe, data or tokenizers do not fit, `out` is taken, or k or a temperature cannot be.
        ArtifactError, UnsupportedModelError: a model directory is damaged or of an unknown family.
    """
    out, recipe = Path(out), continued(recipe).model_copy(update={"teacher_logits": None})
    check_free(out, overwrite=overwrite)
    if recipe.bridge != "none":
        what = "a teacher of other tokens than the student's has no logits for it"
        raise UserError(what, mend="leave out orin-kit cache: with bridge: sequences the teacher answers only once")
    accelerator = make_accelerator(recipe.precision)
    if accelerator.num_processes > 1:
        raise UserError("orin-kit cache runs in one process", mend="start it without accelerate launch")
    pair = load_pair(recipe)
    assert pair.teacher is not None  # no stored logits stand in for it
    at = sorted(set(temperatures or default_temperatures(recipe.stages.task.temperature)))
    settings = _settings(recipe, pair, k, at)
    inputs = {role: path for role, path in recipe_inputs(recipe).items() if role != "student"}
    partial = _open_partial(out, _identity(settings, inputs, shard_bytes), overwrite=overwrite)
    rows = _rows(recipe, pair, partial / ANSWERS, progress=progress)
    with progress_bar(progress) as bar:
        task = bar.add_task("the teacher's logits", total=len(rows))
        files = write_logits(
            LiveTeacher(pair.teacher.to(accelerator.device)), rows, partial,
            k=k, temperatures=at, batch_size=recipe.batch_size, device=accelerator.device,
            vocab_size=settings["vocab_size"], shard_bytes=shard_bytes,
            advance=lambda count: bar.advance(task, count),
        )  # fmt: skip
    with write_artifact(out, KIND, inputs=inputs, settings=settings, overwrite=overwrite) as artifact:
        for file in [*files, *partial.glob(ANSWERS)]:
            _share(file, artifact.directory / file.name)
        artifact.results.update(_figures(rows, artifact.directory))
    shutil.rmtree(partial)
    if progress:
        found = artifact.results
        said = f"{found['rows']:,} rows, {found['positions']:,} asked positions, {found['bytes'] / 1e9:.2f} GB"
        Console().print(f"wrote {out}: {said}", highlight=False, soft_wrap=True)
    return artifact.results


def _settings(recipe: Recipe, pair: Pair, k: int, temperatures: Sequence[float]) -> dict[str, Any]:
    told = recipe.model_dump(mode="json", include={"data", "seed", "precision", "batch_size", "max_new_tokens"})
    return {
        "k": k,
        "temperatures": list(temperatures),
        "teacher": str(recipe.teacher or recipe.student),
        "vocab_size": len(pair.tokenizer),
        "vocabulary": vocabulary_digest(pair.tokenizer_directory),
        **told,
    }


def _rows(recipe: Recipe, pair: Pair, answers: Path, *, progress: bool) -> list[Example]:
    """The rows that training will ask about, each once."""
    chats = answered(recipe, pair, answers, progress=progress)
    data = load_dataset(recipe, pair.tokenizer, chats, answers.with_name("translations.jsonl"))
    rows = [*data.train, *(data.general.rehearsed if data.general else [])]
    return list({row_key(row): row for row in rows}.values())


def _figures(rows: Sequence[Example], directory: Path) -> dict[str, Any]:
    positions = sum(map(asked_positions, rows))
    size = sum(file.stat().st_size for file in directory.glob("logits-*.safetensors"))
    return {"rows": len(rows), "positions": positions, "bytes": size, "bytes_per_position": round(size / positions, 1)}


def _identity(settings: Mapping[str, Any], inputs: Mapping[str, Path], shard_bytes: int) -> str:
    """Hash of all that decides the shards, but for the rows: every shard says itself which it holds."""
    content = {role: sha256_input(path) for role, path in inputs.items()}
    return hashlib.sha256(json.dumps([settings, content, shard_bytes], sort_keys=True).encode()).hexdigest()


def _open_partial(out: Path, identity: str, *, overwrite: bool) -> Path:
    """The directory of finished shards.

    Raises:
        UserError: it holds those of another recipe, and `overwrite` is off.
    """
    partial = out.absolute().parent / f".{out.name}.logits-partial"
    told = partial / IDENTITY
    if partial.is_dir() and not (told.is_file() and told.read_text("utf-8") == identity):
        if not overwrite and any(partial.glob("*.*")):  # shards, or the teacher's answers
            what = f"{partial} holds the unfinished logits of another recipe, or of another teacher or data"
            raise UserError(what, mend="run that recipe again to go on with it, or add --overwrite to start anew")
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    told.write_text(identity, "utf-8")
    return partial


def _share(file: Path, place: Path) -> None:
    """Give a file a second name, so that a kill before the artifact is in its place leaves the first; else copy it."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
