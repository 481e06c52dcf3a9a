"""Kill orin-kit at random moments and see that no half-written artifact is ever accepted.

    python tools/kill_test.py [--kills 24] [--seed 0] [--only distill]

Every row of `COMMANDS` is run undisturbed first, to know how long it takes and what it gives. Then it is started again
and again, each time killed with SIGKILL after a random time, until its share of the kills is spent; after each kill the
output directory must be absent, or complete by `read_manifest(verify=True)`. At last it is left alone, and its result
must be the undisturbed one's: distill resumes from its checkpoint, quantize and export start over.

Half of the kills are aimed at the last tenth of a run, where the artifact is being written. Exit code 1 when a check
fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from orin_kit.errors import ArtifactError
from orin_kit.manifest import read_manifest
from orin_kit.tokenizer import TOKENIZER_FILES

TOKENIZER = Path(__file__).parents[1] / "calibration/demo-teacher"
SIZES = {"teacher": (256, 4), "student": (128, 2)}  # hidden_size and layers; widths that groups of 128 divide
RECIPE = """\
teacher: teacher
student: student
data: {tasks: {count: 300}, row_length: 64}
batch_size: 4
checkpoint_every: 4
test_items: 8
max_new_tokens: 8
stages:
  features: {steps: 20, learning_rate: 1.0e-3}
  attention: {steps: 20, learning_rate: 1.0e-3, calibration_batches: 2}
  task: {steps: 20, learning_rate: 1.0e-3, teacher_weight: {every: 7}}
"""


@dataclass(frozen=True)
class Command:
    """One verb under test.

    Attributes:
        argv: builds the arguments of `python -m orin_kit`, given the output directory; run in the scratch directory.
        result: what must be equal between a disturbed and an undisturbed artifact.
    """

    argv: Callable[[str], list[str]]
    result: Callable[[Path], Any]


def final_loss_and_weights(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())["final_loss"], weights(out)


def weights(out: Path) -> dict[str, str]:
    """sha256 of every data file."""
    files = [f for f in sorted(out.iterdir()) if f.suffix in (".safetensors", ".onnx", ".data")]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


COMMANDS: dict[str, Command] = {
    "distill": Command(lambda out: ["distill", "recipe.yaml", "--out", out], final_loss_and_weights),
    "quantize": Command(lambda out: ["quantize", "teacher", "--out", out, "--samples", "8"], weights),
    "export": Command(lambda out: ["export", "teacher", "--out", out, "--precision", "fp16"], weights),
}


def prepare(scratch: Path) -> None:
    """Two random models and a recipe."""
    for seed, (name, (hidden, layers)) in enumerate(SIZES.items()):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=2048, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
            tie_word_embeddings=True,
        )  # fmt: skip
        Qwen2ForCausalLM(config).half().save_pretrained(scratch / name)
        for file in TOKENIZER_FILES:
            if (TOKENIZER / file).is_file():
                shutil.copy(TOKENIZER / file, scratch / name / file)
    (scratch / "recipe.yaml").write_text(RECIPE, "utf-8")


def start(command: Command, scratch: Path, out: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "orin_kit", *command.argv(out)]
    # One thread: the sums of an undisturbed run and of a resumed one are then made in the same order.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        argv, cwd=scratch, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(command: Command, scratch: Path, out: str) -> float:
    """Run to the end; the seconds it took."""
    begun = time.monotonic()
    process = start(command, scratch, out)
    _, stderr = process.communicate()
    if process.returncode:
        sys.exit(f"{command.argv(out)} ended with {process.returncode}: {stderr.decode()[-2000:]}")
    return time.monotonic() - begun


def kill_after(command: Command, scratch: Path, out: str, seconds: float) -> float | None:
    """Start, wait, kill its whole process group; when it had finished by then, the seconds it took."""
    begun = time.monotonic()
    process = start(command, scratch, out)
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        sys.exit(f"{command.argv(out)} ended with {process.returncode}: {stderr.decode()[-2000:]}")
    return time.monotonic() - begun


def judge(out: Path) -> str:
    """Whether what lies at `out` is absent or complete; anything else is a failure."""
    if not out.exists():
        try:
            read_manifest(out)
        except ArtifactError:
            return "absent"
        return "FAILED: accepted, but it does not exist"
    try:
        read_manifest(out, verify=True)
    except ArtifactError as error:
        return f"FAILED: {out.name} exists and is not complete: {error}"
    return "complete"


def torture(name: str, command: Command, scratch: Path, kills: int, rng: random.Random) -> bool:
    """Kill one command `kills` times; true when every check held."""
    seconds = finish(command, scratch, f"{name}-undisturbed")
    expected = command.result(scratch / f"{name}-undisturbed")
    print(f"{name}: {seconds:.1f} s undisturbed", flush=True)
    out, good, done = f"{name}-killed", True, 0
    while done < kills:
        share = rng.uniform(0.9, 1.02) if done % 2 else rng.uniform(0.05, 0.9)
        took = kill_after(command, scratch, out, share * seconds)
        verdict = judge(scratch / out)
        good &= not verdict.startswith("FAILED")
        if took is None:
            done += 1
            print(f"{name}: kill {done} of {kills} at {share * seconds:.1f} s: {verdict}", flush=True)
        else:  # the machine is less busy than before, or little was left to resume
            seconds = (seconds + took) / 2
        if verdict == "complete":  # by the end of the run, or just before the kill
            good &= same(name, command.result(scratch / out), expected)
            shutil.rmtree(scratch / out)
    if not (scratch / out).exists():
        finish(command, scratch, out)
    good &= same(name, command.result(scratch / out), expected)
    left = [p.name for p in scratch.glob(f".{out}.*")]
    if left:
        print(f"{name}: FAILED: left behind: {', '.join(left)}")
    return good and not left


def same(name: str, found: Any, expected: Any) -> bool:
    if found != expected:
        print(f"{name}: FAILED: the result differs from the undisturbed one: {found} != {expected}")
    return bool(found == expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24, help="in all, shared out among the commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(COMMANDS), action="append", help="test these commands alone")
    args = parser.parse_args()
    chosen = args.only or list(COMMANDS)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="orin-kit-kill-") as home:
        prepare(Path(home))
        # All of them, also after a failure.
        shares = [args.kills // len(chosen) + (i < args.kills % len(chosen)) for i in range(len(chosen))]
        held = [
            torture(name, COMMANDS[name], Path(home), kills, rng) for name, kills in zip(chosen, shares, strict=True)
        ]
    print("all checks held" if all(held) else "FAILED")
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
