"""Where the time of an INT4 decoder goes on this CPU, and what each choice in it costs.

    python tools/bench/decode_knobs.py --model /tmp/orin-kit-bench/1.5b/checkpoint --json knobs.json

Every variant differs from the first in one thing. Each runs in a process of its own, the variants take turns; reported
are medians of the rounds. The operators' times are onnxruntime's own profile of the first variant: the profile slows a
step by a few percent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from orin_kit.export.export import export
from orin_kit.quantize.quantize import quantize
from orin_kit.runtime.backends import onnx as onnx_backend

# What `export` and `quantize` are told (a variant without quantize options is rounded at export), and the session.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "groups of 128, symmetric, accuracy level 4": ({}, {}, {}),
    "groups of 64": ({"group_size": 64}, {}, {}),
    "groups of 32": ({"group_size": 32}, {}, {}),
    "asymmetric": ({}, {"symmetric": False}, {}),
    "accuracy level 0 (fp32)": ({"accuracy_level": 0}, {}, {}),
    "head in fp32": ({"embedding_bits": 16, "tie": False}, {"head_bits": 16}, {}),
    "fp16 activations": ({"activations": "fp16"}, {}, {}),
    "threads do not spin": ({}, {}, {"session.intra_op.allow_spinning": "0"}),
    "blocks handed out as they end": ({}, {}, {"session.dynamic_block_base": "4"}),
}
PROMPTS, CONTEXTS, STEPS, MAX_LEN = (128, 512), (128, 1024), 32, 2304


def make(name: str, options: argparse.Namespace) -> Path:
    """The variant's ONNX directory, made once; variants of one graph share it."""
    to_export, to_quantize, _ = VARIANTS[name]
    label = "-".join(f"{key}={value}" for key, value in {**to_export, **to_quantize}.items()) or "base"
    out: Path = options.work / label
    if not out.exists():
        model, common = options.model, dict(max_len=MAX_LEN, progress=False)
        if to_quantize:
            model = options.work / f"{label}-checkpoint"
            if not model.exists():
                quantize(options.model, model, method="rtn", perplexity=False, embedding_bits=16, **to_quantize)
            export(model, out, **common, **to_export)
        else:
            export(model, out, precision="int4", **common, **to_export)
    return out


def opened(directory: Path, threads: int, entries: dict[str, str], profile: bool = False) -> Any:
    """The runtime's backend, its session told more than it usually is."""
    plain = onnx_backend.ort.SessionOptions

    def told() -> Any:
        session = plain()
        for key, value in entries.items():
            session.add_session_config_entry(key, value)
        session.enable_profiling, session.profile_file_prefix = profile, str(directory.parent / "profile")
        return session

    onnx_backend.ort.SessionOptions = told
    return onnx_backend.OnnxBackend(directory, max_len=MAX_LEN, threads=threads)


def measure(directory: Path, threads: int, entries: dict[str, str]) -> dict[str, float]:
    """Tokens a second of prompts, milliseconds of a step at each context."""
    backend, rng = opened(directory, threads, entries), np.random.default_rng(0)
    backend.prefill([[1] * 16])
    found: dict[str, float] = {}
    for length in PROMPTS:
        seconds = []
        for _ in range(2):
            backend.reset()
            start = time.perf_counter()
            backend.prefill([rng.integers(0, 4096, length).tolist()])
            seconds.append(time.perf_counter() - start)
        found[f"prefill {length}, tok/s"] = length / statistics.median(seconds)
    for context in CONTEXTS:
        found[f"decode at {context}, ms"] = 1e3 * statistics.median(decode(backend, rng, context))
    return found


def decode(backend: Any, rng: np.random.Generator, context: int) -> list[float]:
    backend.reset()
    backend.prefill([rng.integers(0, 4096, context).tolist()])
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        backend.decode(rng.integers(0, 4096, 1))
        seconds.append(time.perf_counter() - start)
    return seconds


def operators(directory: Path, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each operator in a step and in a prompt, and of the whole run ("all, and what lies between")."""
    backend, rng = opened(directory, threads, {}, profile=True), np.random.default_rng(0)
    for context in CONTEXTS:
        decode(backend, rng, context)
    backend.reset()
    backend.prefill([rng.integers(0, 4096, PROMPTS[-1]).tolist()])
    file = Path(backend._session.end_profiling())
    events = json.loads(file.read_text("utf-8"))
    file.unlink()
    runs = [event for event in events if event["name"] == "model_run"]
    parts = {
        f"decode at {CONTEXTS[0]}, ms": runs[1 : 1 + STEPS],
        f"decode at {CONTEXTS[1]}, ms": runs[2 + STEPS : 2 + 2 * STEPS],
        f"prefill {PROMPTS[-1]}, ms": runs[-1:],
    }
    return {part: per_run(events, chosen) for part, chosen in parts.items()}


def per_run(events: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, float]:
    spent: Counter[str] = Counter()
    first, last = runs[0]["ts"], runs[-1]["ts"] + runs[-1]["dur"]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and first <= event["ts"] <= last:
            spent[kind(event["args"])] += event["dur"]
    total = statistics.fmean(run["dur"] for run in runs) / 1e3
    return {name: duration / 1e3 / len(runs) for name, duration in spent.most_common()} | {"the whole run": total}


def kind(arguments: dict[str, Any]) -> str:
    name: str = arguments["op_name"]
    if name != "MatMulNBits":
        return name
    shape = next(iter(arguments["output_type_shape"][0].values()))
    return f"{name}, {shape[-1]} outputs"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a plain checkpoint")
    parser.add_argument("--work", type=Path, default=Path("/tmp/orin-kit-knobs"), help="models are kept there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = arguments().parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        where = make(options.one.removesuffix(" profile"), options)
        if options.one.endswith(" profile"):
            print(json.dumps(operators(where, options.threads)))
        else:
            print(json.dumps(measure(where, options.threads, VARIANTS[options.one][2])))
        return
    for name in options.variants:
        make(name, options)
    if options.prepare:
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for _ in range(options.rounds):
        for name in options.variants:
            results[name].append(child(name))
    profile = child(f"{options.variants[0]} profile")
    print(markdown(results, profile))
    if options.json:
        options.json.write_text(json.dumps({"variants": results, "operators": profile}, indent=1) + "\n", "utf-8")


def child(name: str) -> Any:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def markdown(results: dict[str, list[dict[str, float]]], profile: dict[str, dict[str, float]]) -> str:
    heads = list(next(iter(results.values()))[0])
    lines = ["| variant | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, runs in results.items():
        cells = (f"{statistics.median(run[head] for run in runs):.3g}" for head in heads)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    parts = list(profile)
    lines += ["", "| operator | " + " | ".join(parts) + " |", "|---|" + "---:|" * len(parts)]
    for name in dict.fromkeys(name for part in profile.values() for name in part):
        cells = [f"{profile[part].get(name, 0):.2f}" for part in parts]
        if any(float(cell) >= 0.1 for cell in cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
