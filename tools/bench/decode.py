"""Tokens a second of a 4-bit Qwen2.5 on this CPU: orin-kit, llama.cpp, onnxruntime-genai and transformers in one run.

    python tools/bench/decode.py --threads 2 --llama-python ~/llama/bin/python --json docs/measurements/decode.json

The checkpoints have the real shapes and random weights, so speed and memory are real and text is not. Every engine gets
the same prompts of random ids and answers greedily, whatever it would take for an end. Each runs in a process of its
own, and the engines take turns, round after round, so that whatever else the machine does hits all alike; in each round
the read bandwidth of memory is measured too. Reported are the median of the rounds, the least and the most.

- Prefill: prompt tokens over the time until the first answer token is chosen. Decode: one over the median step, the
  choice of the token included, after a prompt of the given length. Percent: how near that comes to the floor, the time
  to read the weights and the cache once at the best bandwidth of the run.
- Memory, at the end: resident, of which the process's own (anonymous) and what is mapped from files, and the peak.
- Load: from the engine's imports being done until it can take a prompt, its files being in the page cache.
- Logits: correlation of the first prompt's logits with the unquantized model's, to see that all compute the same.

Models are made once, into --work (13 GB for 1.5B). An engine that is not installed is left out. llama.cpp is best built
for the machine: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python==0.3.36.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from decode_models import CASES, INSTALL, PEERS, SHAPES, Case, Models
from decode_report import (
    file_bytes,
    gguf_bytes_a_token,
    markdown,
    onnx_bytes_a_token,
    onnx_cache_bytes_a_token,
)
from processes import environment, run

IMPORTS = {"llama.cpp": "llama_cpp", "genai": "onnxruntime_genai", "orin-kit": "orin_kit", "transformers": "torch"}


def interpreter(engine: str, options: argparse.Namespace) -> str:
    return {"llama.cpp": options.llama_python, "genai": options.genai_python}.get(engine, sys.executable)


def installed(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """The cases whose engine is here; says so of the others."""
    missing = set()
    for engine in dict.fromkeys(case.engine for case in cases):
        python = shutil.which(interpreter(engine, options))
        command = [python or "", "-c", f"import {IMPORTS[engine]}"]
        if python is None or subprocess.run(command, capture_output=True, check=False).returncode:
            missing.add(engine)
            print(f"{engine} is left out; to have it: {INSTALL[engine]}", file=sys.stderr)
    return [case for case in cases if case.engine not in missing]


def describe(case: Case, model: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A row's constants: bytes of its files, and what a decode step reads of weights and, for each token, of cache."""
    row: dict[str, Any] = {"case": case.name, "file_bytes": file_bytes(model), "runs": []}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    cached = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim  # elements a token
    if case.engine == "llama.cpp":
        return row | {"bytes_a_token": gguf_bytes_a_token(model), "cache_bytes_a_token": 2 * cached}
    if case.engine == "transformers":
        size = 4 if "float32" in case.options else 2
        return row | {"bytes_a_token": row["file_bytes"] * size // 2, "cache_bytes_a_token": size * cached}
    graph = model / "model.onnx"
    cache = {"cache_bytes_a_token": onnx_cache_bytes_a_token(graph, head_dim)}
    return row | {"bytes_a_token": onnx_bytes_a_token(graph)} | cache


def passes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Prompt and new tokens of each answer: short prompts several times, contexts that are no prompt length once."""
    lengths = sorted(set(options.prompts) | set(options.contexts))
    new = {length: options.new_tokens if length in options.contexts else 0 for length in lengths}
    short = [(length, new[length]) for length in lengths if length in options.prompts]
    return short * options.repeats + [(length, new[length]) for length in lengths if length not in options.prompts]


def measure(case: Case, model: Path, vocab_size: int, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process of one engine; its first logits stay in `scratch`."""
    for file in [model] if model.is_file() else model.iterdir():
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=False)  # into the page cache
    out = scratch / f"{case.name.replace(' ', '-')}.json"
    script = PEERS / "run_decode.py"
    command: list[str | Path] = [interpreter(case.engine, options), script, case.engine, model, "--out", out]
    command += ["--threads", str(options.threads), "--vocab", str(vocab_size), *case.options]
    command += ["--max-len", str(max(options.prompts + options.contexts) + options.new_tokens + 8)]
    for length, new in passes(options):
        command += ["--pass", f"{length},{new}"]
    run(command, environment(options.threads), out.with_suffix(".log"))
    return dict(json.loads(out.read_text("utf-8")))


def bandwidth(options: argparse.Namespace) -> dict[str, Any]:
    """What `bandwidth.py` found, in a process of its own."""
    command = [sys.executable, str(Path(__file__).parent / "bandwidth.py"), "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def add_correlations(rows: Sequence[dict[str, Any]], scratch: Path) -> None:
    """Of every row's first logits with those of the unquantized model, fp32 if it ran."""
    logits = {row["case"]: scratch / f"{row['case'].replace(' ', '-')}.npy" for row in rows}
    whole = [case for case in ("transformers fp32", "transformers bf16") if case in logits]
    if whole:
        reference = np.load(logits[whole[0]]).astype(np.float64)
        for row in rows:
            row["correlation"] = float(np.corrcoef(reference, np.load(logits[row["case"]]))[0, 1])


def measure_shape(shape: str, cases: Sequence[Case], options: argparse.Namespace, save: Any) -> dict[str, Any]:
    """All rounds of a shape; `save` is given the section after each process."""
    models = Models(options.work, shape, options)
    paths = {case.name: models.get(case.model) for case in cases}
    models.forget_intermediate()
    config = SHAPES[shape]
    rows = {case.name: describe(case, paths[case.name], config) for case in cases}
    made = {case.model: models.made(case.model) for case in cases}
    section: dict[str, Any] = {"bandwidth": [], "rows": list(rows.values()), "made": made}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for number in range(options.rounds):
            for case in cases:
                if case.engine == "transformers" and number >= options.transformers_rounds:
                    continue
                print(f"{shape} [{number + 1}/{options.rounds}] {case.name}", file=sys.stderr, flush=True)
                found = measure(case, paths[case.name], config["vocab_size"], Path(folder), options)
                rows[case.name]["runs"].append(found)
                read = bandwidth(options)
                section["bandwidth_by"] = read["how"]
                section["bandwidth"].append(read["bytes_per_second"])
                save(section)
            add_correlations([row for row in section["rows"] if row["runs"]], Path(folder))
            save(section)
    return section


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="rows; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each engine")
    parser.add_argument("--transformers-rounds", type=int, default=1, help="of transformers, which is slow")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512], help="prefill lengths")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048], help="contexts to decode at")
    parser.add_argument("--new-tokens", type=int, default=64, help="decode steps at each context")
    parser.add_argument("--repeats", type=int, default=2, help="of the prefill lengths, in each process")
    parser.add_argument("--llama-python", default=sys.executable, help="the interpreter with llama-cpp-python")
    parser.add_argument("--genai-python", default=sys.executable, help="the interpreter with onnxruntime-genai")
    parser.add_argument("--quantize-options", default="--method rtn --no-perplexity --embedding-bits 4")
    parser.add_argument("--export-options", default="--max-len 4096")
    parser.add_argument("--work", type=Path, default=Path("/tmp/orin-kit-bench"), help="models are kept there")
    parser.add_argument("--remake", nargs="+", default=[], metavar="MODEL", help="make anew, such as orin-kit")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument("--json", type=Path, help="write every figure there, after each process")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    parser.add_argument("--show", type=Path, help="measure nothing: the tables of this JSON file")
    return parser


def main() -> None:
    options = arguments().parse_args()
    if options.show:
        print(markdown(json.loads(options.show.read_text("utf-8"))))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = options.cases or [case.name for case in CASES]
    cases = installed([case for case in CASES if case.name in wanted], options)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report: dict[str, Any] = {"settings": settings, "machine": machine(), "shapes": {}}
    for shape in options.shapes:
        if options.prepare:
            models = Models(options.work, shape, options)
            print(*(models.get(case.model) for case in cases), sep="\n")
            models.forget_intermediate()
            continue

        def save(section: dict[str, Any], shape: str = shape) -> None:
            report["shapes"][shape] = section
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")

        measure_shape(shape, cases, options, save)
    if not options.prepare:
        tables = markdown(report)
        print(tables)
        if options.markdown:
            options.markdown.write_text(tables, "utf-8")


def machine() -> dict[str, Any]:
    """The processor's name as the kernel knows it, how many this process may use, and the system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return {"processor": name, "cpus": len(os.sched_getaffinity(0)), "system": platform.platform()}


if __name__ == "__main__":
    main()
