"""What 4-bit weights cost, side by side: orin-kit, llm-compressor and NVIDIA's modelopt on the same models and text.

    python tools/bench/quantize_peers.py --demo student=DIR --text gsm8k=DIR --gsm8k ~/gsm8k \\
        --llm-compressor ~/llmc/bin/python --modelopt ~/modelopt/bin/python --json quantization.json

`--demo` models answer the synthetic tasks, so they are scored by exact match too; `--text` models are made by
`train_text_model.py`. Each peer runs in an interpreter of its own, because it pins another transformers:

    python -m venv ~/llmc && ~/llmc/bin/pip install torch llmcompressor
    python -m venv ~/modelopt && ~/modelopt/bin/pip install torch 'nvidia-modelopt[hf]'

Everybody gets the same fp16 model and the same calibration rows, computes in fp32, quantizes the linears of the decoder
layers in groups of 128 and leaves the head alone (where a row does not say otherwise). One evaluator reads what they
write: perplexity of unseen answers, the divergence KL(fp16 || quantized) of the next token there (nats a token), how
often both find the same token likeliest; exact match of greedy answers, by exporting the dequantized weights in fp32,
so that nothing but the weights differs. Cases that calibrate run once a seed, which draws other calibration text.
What the JSON file already holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantize_report import console_table, markdown
from quantize_scores import Judge, answer_accuracy, example_batches

from orin_kit.data.chat import Chat, write_chats
from orin_kit.data.packing import tokenize_chat
from orin_kit.data.tasks import distinct
from orin_kit.manifest import made_by
from orin_kit.quantize.calibrate import read_samples
from orin_kit.quantize.quantize import quantize
from orin_kit.tokenizer import ChatTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from gsm8k import read_gsm8k  # it lies one folder up

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: what it says.
        tool: who quantizes; None for the fp16 model itself.
        options: of `orin_kit.quantize`, or of the peer's script in `peers/`.
        calibrated: whether other calibration text could change it.
    """

    name: str
    tool: str | None
    options: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = True


CASES = (
    Case("fp16", None, calibrated=False),
    Case("orin-kit rtn", "orin-kit", {"method": "rtn"}, calibrated=False),
    Case("orin-kit gptq", "orin-kit", {"method": "gptq"}),
    Case("orin-kit gptq, act order", "orin-kit", {"method": "gptq", "act_order": True}),
    Case("orin-kit awq", "orin-kit", {"method": "awq"}),
    Case("orin-kit awq, head too", "orin-kit", {"method": "awq", "lm_head": True}),
    Case("orin-kit rtn, asymmetric", "orin-kit", {"method": "rtn", "symmetric": False}, calibrated=False),
    Case("orin-kit gptq, asymmetric", "orin-kit", {"method": "gptq", "symmetric": False}),
    Case("orin-kit awq, asymmetric", "orin-kit", {"method": "awq", "symmetric": False}),
    Case("orin-kit rtn, int8", "orin-kit", {"method": "rtn", "bits": 8}, calibrated=False),
    Case("llm-compressor rtn", "llm-compressor", {"method": "rtn"}, calibrated=False),
    Case("llm-compressor gptq", "llm-compressor", {"method": "gptq"}),
    Case("llm-compressor awq", "llm-compressor", {"method": "awq"}),
    Case("llm-compressor rtn, asymmetric", "llm-compressor", {"method": "rtn", "asymmetric": True}, calibrated=False),
    Case("llm-compressor gptq, asymmetric", "llm-compressor", {"method": "gptq", "asymmetric": True}),
    Case("llm-compressor awq, asymmetric", "llm-compressor", {"method": "awq", "asymmetric": True}),
    Case("modelopt rtn", "modelopt", {"method": "rtn"}, calibrated=False),
    Case("modelopt awq", "modelopt", {"method": "awq"}),
    Case("modelopt awq and clip", "modelopt", {"method": "awq-clip"}),
)


@dataclass(frozen=True)
class Subject:
    """A model with the text for it.

    Attributes:
        name, directory: of the fp16 checkpoint.
        calibration: chats to calibrate on, jsonl; None for the synthetic tasks.
        judge: measures perplexity and divergence on unseen text.
        questions: for exact match; 0 for none.
    """

    name: str
    directory: Path
    calibration: Path | None
    judge: Judge
    questions: int


def subjects(options: argparse.Namespace, scratch: Path) -> list[Subject]:
    found = []
    calibration = scratch / "calibration.jsonl"
    if options.text:
        write_chats(calibration, read_gsm8k(options.gsm8k / "train.jsonl"))
    for name, directory in options.demo:
        chats = [task.chat() for task in distinct("test", seed=1, count=options.chats)]
        found.append(Subject(name, directory, None, _judge(directory, chats), options.questions))
    for name, directory in options.text:
        chats = read_gsm8k(options.gsm8k / "test.jsonl")[: options.chats]
        found.append(Subject(name, directory, calibration, _judge(directory, chats), 0))
    return found


def _judge(directory: Path, chats: Sequence[Chat]) -> Judge:
    tokenizer = ChatTokenizer(directory)
    return Judge(directory, example_batches([tokenize_chat(tokenizer, chat) for chat in chats]))


def make(case: Case, subject: Subject, seed: int, out: Path, options: argparse.Namespace) -> None:
    """Quantize a model into `out`."""
    length = {"samples": options.samples, "sample_length": options.sample_length, "seed": seed}
    if case.tool == "orin-kit":
        ours = {"lm_head": False, "perplexity": False, **length, **case.options}
        quantize(subject.directory, out, calibration=subject.calibration, **ours)
        return
    tokenizer = ChatTokenizer(subject.directory)
    rows = out.with_suffix(".npy")
    vocabulary = json.loads((subject.directory / "config.json").read_text("utf-8"))["vocab_size"]
    np.save(rows, read_samples(tokenizer, subject.calibration, vocab_size=vocabulary, **length).rows)
    script = PEERS / f"run_{(case.tool or '').replace('-', '_')}.py"
    command = [str(interpreter(case, options)), str(script), "--model", str(subject.directory)]
    command += ["--rows", str(rows), "--out", str(out)]
    for name, value in case.options.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # its interpreter, its packages
    done = subprocess.run(
        command, check=False, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stdout[-3000:]}")


def interpreter(case: Case, options: argparse.Namespace) -> Path | None:
    paths: dict[str | None, Path | None] = {"llm-compressor": options.llm_compressor, "modelopt": options.modelopt}
    return paths.get(case.tool, Path(sys.executable))


def measure(case: Case, subject: Subject, seed: int, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as kept:
        directory, start = subject.directory, time.perf_counter()
        if case.tool is not None:
            directory = Path(kept) / "quantized"
            make(case, subject, seed, directory, options)
        seconds = time.perf_counter() - start
        found: dict[str, Any] = subject.judge.scores(directory)
        if subject.questions:
            found["exact_match"] = answer_accuracy(directory, subject.directory, subject.questions, Path(kept))
    return {"model": subject.name, "case": case.name, "seed": seed, **found, "seconds": round(seconds, 1)}


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    settings = {"samples": options.samples, "sample_length": options.sample_length, "chats": options.chats}
    settings |= {"questions": options.questions, "group_size": 128, "made_by": made_by()}
    results: list[dict[str, Any]] = []
    if options.json.is_file():
        results = json.loads(options.json.read_text("utf-8"))["results"]
    known = {(row["model"], row["case"], row["seed"]) for row in results}
    for subject, seed, case in planned(subjects(options, scratch), options):
        if (subject.name, case.name, seed) not in known:
            found = measure(case, subject, seed, scratch, options)
            print(json.dumps(found), file=sys.stderr, flush=True)
            results = in_order([*results, found])
            text = json.dumps({"settings": settings, "results": results}, indent=1) + "\n"
            options.json.write_text(text, "utf-8")
    return {"settings": settings, "results": results}


def planned(models: Sequence[Subject], options: argparse.Namespace) -> Iterator[tuple[Subject, int, Case]]:
    """What is to be measured, every case with the first seed before any with the second."""
    chosen = [case for case in CASES if not options.only or any(part in case.name for part in options.only)]
    able = [case for case in chosen if interpreter(case, options) is not None]
    for case in chosen:
        if case not in able:
            print(f"{case.name}: left out, give --{case.tool} the interpreter it is installed in", file=sys.stderr)
    for subject in models:
        for seed in range(options.seeds):
            yield from ((subject, seed, case) for case in able if case.calibrated or seed == 0)


def in_order(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model, as they came, then as `CASES` says."""
    models = list(dict.fromkeys(row["model"] for row in results))
    cases = [case.name for case in CASES]
    return sorted(results, key=lambda row: (models.index(row["model"]), cases.index(row["case"]), row["seed"]))


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.rpartition("=")
    return name or Path(path).name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=_named, nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument("--text", type=_named, nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument("--gsm8k", type=Path, help="holds train.jsonl and test.jsonl, for --text")
    parser.add_argument("--llm-compressor", type=Path, help="python in whose environment llm-compressor is")
    parser.add_argument("--modelopt", type=Path, help="python in whose environment modelopt is")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--sample-length", type=int, default=256, help="tokens of each")
    parser.add_argument("--chats", type=int, default=256, help="unseen chats whose answers are scored")
    parser.add_argument("--questions", type=int, default=1200, help="for exact match of --demo models")
    parser.add_argument("--only", nargs="+", help="cases whose name has one of these in it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("quantization.json"), help="every figure")
    parser.add_argument("--markdown", type=Path, help="the tables")
    options = parser.parse_args()
    if options.text and options.gsm8k is None:
        parser.error("--text needs --gsm8k")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        report = run(options, Path(scratch))
    console_table(report)
    if options.markdown:
        options.markdown.write_text(markdown(report), "utf-8")


if __name__ == "__main__":
    main()
