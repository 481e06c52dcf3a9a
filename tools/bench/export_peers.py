"""From a plain checkpoint to an INT4 ONNX model: orin-kit and onnxruntime-genai's builder, seconds and peak memory.

    python tools/bench/export_peers.py --json docs/measurements/export-peers.json

The checkpoint is a random-weight Qwen2.5-1.5B in bf16. Both round to nearest, symmetric, and quantize the head;
orin-kit does it in one command (`export --precision int4`) or in two (quantize, export), whose seconds add up and whose
larger peak counts. Each command is a process of its own, the tools take turns, and the peak is the kernel's count of
that process (wait4), imports included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from decode import arguments as decode_arguments
from decode import machine
from decode_models import GENAI, SHAPES, Models, genai_builder, orin_kit_commands
from decode_report import file_bytes, line_of_table, spread
from processes import environment, run

ONE_STEP, TWO_STEPS = "orin-kit export", "orin-kit quantize, export"


def export_once(tool: str, checkpoint: Path, scratch: Path, options: argparse.Namespace) -> dict[str, float]:
    """Export into `scratch`, which is emptied first."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    out = scratch / "model"
    if tool == ONE_STEP:
        commands = [[sys.executable, "-m", "orin_kit", "export", checkpoint, "--out", out, "--precision", "int4"]]
    elif tool == TWO_STEPS:
        commands = orin_kit_commands(checkpoint, out, options)
    else:
        commands = [genai_builder(Path(options.genai_python), checkpoint, out, scratch / "cache", GENAI[tool])]
    env = environment(options.threads)
    steps = [run(command, env, scratch / f"log-{number}.txt") for number, command in enumerate(commands)]
    found = {"seconds": sum(step["seconds"] for step in steps), "peak_bytes": max(step["peak_bytes"] for step in steps)}
    return found | {"file_bytes": file_bytes(out)}


def markdown(report: dict[str, Any]) -> str:
    """The table: median of the runs (least-most)."""
    lines = [["exporter", "seconds", "peak memory, GB", "file, GB"], ["---", "---:", "---:", "---:"]]
    for tool, runs in report["runs"].items():
        seconds, peak = [run["seconds"] for run in runs], [run["peak_bytes"] / 1e9 for run in runs]
        size = statistics.median(run["file_bytes"] for run in runs) / 1e9
        lines.append([tool, spread(seconds), spread(peak), f"{size:.2f}"])
    return "\n".join(map(line_of_table, lines)) + "\n"


def main() -> None:
    defaults = decode_arguments()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--genai-python", default=sys.executable, help="the interpreter with onnxruntime-genai")
    parser.add_argument("--quantize-options", default=defaults.get_default("quantize_options"))
    parser.add_argument("--export-options", default=defaults.get_default("export_options"))
    parser.add_argument("--work", type=Path, default=defaults.get_default("work"), help="the checkpoint is kept there")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args(namespace=argparse.Namespace(remake=[]))
    checkpoint = Models(options.work, options.shape, options).get("checkpoint")
    runs: dict[str, list[dict[str, float]]] = {ONE_STEP: [], TWO_STEPS: [], "genai": []}
    for number in range(options.rounds):
        for tool, found in runs.items():
            print(f"[{number + 1}/{options.rounds}] {tool}", file=sys.stderr, flush=True)
            found.append(export_once(tool, checkpoint, options.work / "export", options))
    shutil.rmtree(options.work / "export")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {"settings": settings, "machine": machine(), "runs": runs}
    print(markdown(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
