"""`orin-kit distill --compare`: is the teacher worth it? Every seed trains a plain and a distilled student alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from orin_kit.distill.accelerate_setup import make_accelerator
from orin_kit.distill.continual import continued
from orin_kit.distill.recipe import Recipe
from orin_kit.distill.report import compare_summary, compare_table
from orin_kit.distill.run import Scores, distill, run_identity
from orin_kit.errors import ArtifactError, UserError
from orin_kit.manifest import MANIFEST, made_by, read_manifest

ROLES = ("plain", "distilled")


def compare(
    recipe: Recipe, out: str | Path, *, seeds: int = 3, overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train, for each of `seeds` seeds, a student without and one with the teacher, and score all on the same items.

    Both start from the same weights and see the same batches in the same order for the same number of steps; the plain
    one has cross-entropy alone, on every weight, at `recipe.plain`'s learning rate. The seed decides the order of the
    data, the draw of synthetic problems, and a newborn student's weights.

    `out` holds `plain/` and `distilled/`, two `model` artifacts of the first seed (the recipe's own, not the best one:
    choosing among seeds by their test score would flatter it), `seed-N/plain` and `seed-N/distilled` of the others, and
    compare.json. A run that is complete is not run again; one that was killed goes on.

    Args:
        recipe: of the distilled student; its seed is the first.
        out: the directory to write.
        seeds: how many.
        overwrite: replace artifacts of other recipes.
        progress: show bars and print the table.

    Returns:
        The content of compare.json: `summary` (mean and std by model and kind), and `runs`, one a seed.

    Raises:
        As `distill`.
    """
    out, recipe = Path(out), continued(recipe)
    if make_accelerator(recipe.precision).num_processes > 1:
        raise UserError("--compare runs in one process", mend="start it without accelerate launch")
    known: Scores = {}
    runs = []
    for number in range(seeds):
        of_seed = recipe.with_seed(recipe.seed + number)
        home = out if number == 0 else out / f"seed-{of_seed.seed}"
        reports = {
            role: finished_or_run(chosen, home / role, known, overwrite=overwrite, progress=progress)
            for role, chosen in zip(ROLES, (of_seed.without_teacher(), of_seed), strict=True)
        }
        models = {name: score for name, score in reports["plain"]["models"].items() if name != "student"}
        models |= {role: report["models"]["student"] for role, report in reports.items()}
        seconds = {role: report["train_seconds"] for role, report in reports.items()}
        losses = {role: report["final_loss"] for role, report in reports.items()}
        runs.append({"seed": of_seed.seed, "models": models, "train_seconds": seconds, "final_loss": losses})
    summary = compare_summary(runs)
    result = {
        "made_by": made_by(),
        "seeds": seeds,
        "test_items": reports["plain"]["test_items"],
        "steps": recipe.total_steps,
        "summary": summary,
        "runs": runs,
    }
    fresh = out / ".compare.json.new"
    fresh.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    fresh.replace(out / "compare.json")
    if progress:
        Console().print(compare_table(summary, seeds, result["test_items"]))
    return result


def _scored_alike(one: Recipe, other: Recipe) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("test_items", "watched_items", "max_new_tokens"))


def finished_or_run(recipe: Recipe, out: Path, known: Scores, *, overwrite: bool, progress: bool) -> dict[str, Any]:
    """The report of `out` when it is this very run's, complete; else of running it."""
    if (out / MANIFEST).is_file():
        try:
            manifest = read_manifest(out, "model")
            same_run = manifest.settings.get("run") == run_identity(recipe)
            if same_run and _scored_alike(Recipe.parse(manifest.settings["recipe"]), recipe):
                known.update({n: s for n, s in manifest.results["models"].items() if n != "student"})
                return manifest.results
        except ArtifactError:
            if not overwrite:
                raise
    return distill(recipe, out, overwrite=overwrite, progress=progress, known_scores=known)
