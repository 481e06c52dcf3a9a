"""What each part of distillation brings: the demo recipe with parts left out or added, over several seeds, one table.

    python tools/bench/ablation.py --out ablation --seeds 0,1,2 --json docs/measurements/ablation.json

Every arm of a seed sees the same problems and test items. The teacher's answers to a seed's questions are asked for
once and shared by its arms. Runs that are complete are not run again, so seeds can be run by several processes at once
(`--seeds 0`, `--seeds 1`) and gathered by a last call. `--timing` then measures steps of all arms in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orin_kit.distill.comparison import finished_or_run
from orin_kit.distill.pair import ANSWERS
from orin_kit.distill.recipe import Recipe
from orin_kit.distill.report import spread
from orin_kit.distill.run import open_store
from orin_kit.manifest import made_by

RECIPES = Path(__file__).parents[2] / "calibration/recipes"
NO_FEATURES, NO_ATTENTION = ("stages.features=null",), ("stages.attention=null",)
ALONE = (*NO_FEATURES, *NO_ATTENTION, "stages.task.steps=300")
CONV = (f"student={RECIPES.parent / 'demo-conv'}", "data.packing=false", "batch_size=40", *NO_ATTENTION,
        "stages.features.steps=120", "stages.features.layers=[0,1,2,3,4,5]", "stages.task.steps=480",
        "stages.task.learning_rate=2.0e-3", "plain.learning_rate=2.0e-3")  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One row: what it is, overrides of the demo recipe, and whether it has no teacher at all."""

    what: str
    overrides: tuple[str, ...] = ()
    plain: bool = False


ARMS = {
    "plain": Arm("cross-entropy on 600 answered questions", plain=True),
    "answers": Arm(
        "and on the teacher's answers to 4,000 more",
        (*ALONE, "stages.task.teacher_weight={start: 0, low: 0, every: 0}"),
    ),
    "logits": Arm("and the teacher's logits", ALONE),
    "+features": Arm("logits, hidden states first", (*NO_ATTENTION, "stages.task.steps=270")),
    "+attention": Arm("logits, attention maps first", (*NO_FEATURES, "stages.task.steps=270")),
    "all three": Arm("hidden states, attention maps, logits: the demo recipe"),
    "+on-policy": Arm(
        "all three, a quarter of the batches the student's own",
        ("stages.task.on_policy={share: 0.25, max_new_tokens: 64}",),
    ),
    "self": Arm(
        "no teacher but the student as it was, and early exits",
        (*ALONE, "teacher=null", "data.questions=null", "stages.task.learning_rate=2.0e-4", "stages.task.decay=0.5",
         "stages.task.exits={layers: [1, 2], weight: 0.3}"),
    ),
    "conv plain": Arm("a newborn convolutional student, 600 steps", CONV, plain=True),
    "conv": Arm("the same, taught by hidden states and logits", CONV),
}  # fmt: skip


def recipe_of(name: str, seed: int, *extra: str) -> Recipe:
    arm = ARMS[name]
    recipe = Recipe.load(RECIPES / "demo.yaml", [*arm.overrides, f"seed={seed}", *extra])
    return recipe.without_teacher() if arm.plain else recipe


def run(
    name: str, seed: int, home: Path, known: dict[tuple[str, ...], dict[str, Any]], *, gather: bool
) -> dict[str, Any]:
    """The report of one arm and seed, run if need be."""
    recipe = recipe_of(name, seed)
    out = home / f"seed-{seed}" / name.replace(" ", "-")
    shared = home / f"seed-{seed}" / ANSWERS
    if gather:
        report: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
        known.setdefault((), {}).update({n: s for n, s in report["models"].items() if n != "student"})
        return report
    if recipe.data.questions and shared.is_file():
        store = open_store(recipe, out)
        store.directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared, store.answers)
    of_pair = known.setdefault((str(recipe.teacher), str(recipe.student)), {})
    report = finished_or_run(recipe, out, of_pair, overwrite=False, progress=True)
    if (out / ANSWERS).is_file() and not shared.is_file():
        shutil.copy(out / ANSWERS, shared)
    return report


def timing(repeats: int) -> dict[str, float]:
    """Seconds a step of each arm, the median of short runs of all arms in turns; stages in the recipe's proportion."""
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(repeats):
        for name in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                seconds[name].append(_seconds_a_step(name, Path(folder)))
    return {name: statistics.median(of) for name, of in seconds.items()}


def _seconds_a_step(name: str, folder: Path) -> float:
    full = recipe_of(name, 0)
    short = ["data.questions=null", "test_items=1", "watched_items=1", "log_every=1", "checkpoint_every=10000"]
    short += [
        f"stages.{stage}.steps={max(4, of.steps // 20)}" for stage, of in full.running_stages() if full.with_teacher
    ]
    report_dir = folder / "out"
    recipe = recipe_of(name, 0, *short)
    if ARMS[name].plain:
        task = recipe.stages.task.model_copy(update={"steps": 15})
        recipe = recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"task": task})})
    finished_or_run(recipe, report_dir, {}, overwrite=True, progress=False)
    lines = [json.loads(line) for line in (report_dir / "train.log.jsonl").read_text("utf-8").splitlines()]
    total = weight = 0.0
    for stage, of in full.running_stages():
        times = [line["seconds"] for line in lines if line["stage"] == stage]
        steps = [after - before for before, after in pairwise(times[1:])]  # the second step still warms up
        total, weight = total + of.steps * statistics.fmean(steps), weight + of.steps
    return total / weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS), help="names, separated by commas")
    parser.add_argument(
        "--timing", type=int, default=0, metavar="N", help="also time the arms' steps, N short runs each"
    )
    parser.add_argument("--gather", action="store_true", help="take the reports that are there; run nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seeds, names = [int(s) for s in options.seeds.split(",")], options.arms.split(",")
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            report = run(name, seed, options.out, known, gather=options.gather)
            scores[name].append(report["models"]["student"] | {"steps": recipe_of(name, seed).total_steps})
    seconds = timing(options.timing) if options.timing else {}
    rows = {
        name: {
            "what": ARMS[name].what,
            "steps": of[0]["steps"],
            "exact_match": spread([score["accuracy"]["all"] for score in of]),
            "by_seed": [score["accuracy"]["all"] for score in of],
            "held_out_loss": spread([score["held_out_loss"] for score in of]),
            "seconds_a_step": seconds.get(name),
        }
        for name, of in scores.items()
    }
    others = {name: score for of in known.values() for name, score in of.items()}
    result = {"made_by": made_by(), "seeds": seeds, "arms": rows, "before": others}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    Console().print(table(rows, len(seeds)))


def table(rows: dict[str, dict[str, Any]], seeds: int) -> Table:
    made = Table(title=f"exact match on unseen questions, %, mean ± standard deviation over {seeds} seeds")
    for column in ("arm", "what", "steps", "exact match", "held-out loss", "time a step"):
        made.add_column(column, justify="left" if column in ("arm", "what") else "right")
    base = rows.get("plain", {}).get("seconds_a_step")
    for name, row in rows.items():
        match, loss, seconds = row["exact_match"], row["held_out_loss"], row["seconds_a_step"]
        ratio = f" ({seconds / base:.2f}x)" if seconds and base else ""
        made.add_row(
            name,
            row["what"],
            str(row["steps"]),
            f"{100 * match['mean']:.1f} ± {100 * match['std']:.1f}",
            f"{loss['mean']:.4f}",
            f"{seconds:.3f} s{ratio}" if seconds else "",
        )
    return made


if __name__ == "__main__":
    main()
