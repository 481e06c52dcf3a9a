"""Train the demo teacher, a 3.7 M parameter Qwen2, on our synthetic reasoning tasks.

    python tools/train_demo_teacher.py calibration/demo-teacher
    python tools/train_demo_teacher.py calibration/demo-student --size student --steps 400

The second line makes the student that the demo distils: a small model that was trained a little, by itself.

A kill loses at most `--save-every` steps: the same command goes on from there (`pretraining.py`). Hidden matrices are
trained with Muon, everything else with AdamW. On 2 CPU cores it takes about an hour.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pretraining import Batch, Plan, fit, muon, say
from transformers import Qwen2Config, Qwen2ForCausalLM

from orin_kit.data.packing import Example, collate, pack, tokenize_chat
from orin_kit.data.tasks import Task, distinct, generate
from orin_kit.distill.accuracy import accuracy
from orin_kit.distill.dataset import Question
from orin_kit.tokenizer import TOKENIZER_FILES, ChatTokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SIZES: dict[str, dict[str, Any]] = {
    "teacher": {**COMMON, "hidden_size": 256, "intermediate_size": 768},  # 3.7 M parameters
    "student": {**COMMON, "hidden_size": 128, "intermediate_size": 384},  # 1.2 M
}
PEAK_LR = 3e-3


def rows(tokenizer: ChatTokenizer, seed: int, length: int) -> Iterator[Example]:
    """An endless stream of rows of up to `length` tokens, each a few problems in a row."""
    tasks = generate("train", seed)
    while True:
        yield from pack((tokenize_chat(tokenizer, task.chat()) for task in islice(tasks, 256)), length)


def batches(tokenizer: ChatTokenizer, args: argparse.Namespace, start: int) -> Iterator[Batch]:
    for step in range(start, args.steps):
        # A stream of its own for each step: resuming needs no replay.
        chosen = list(islice(rows(tokenizer, args.seed + 1000 * step, args.length), args.batch_size))
        padding = Example([0] * args.length, [False] * args.length)
        full = collate([*chosen, padding], tokenizer.id_of("<|endoftext|>") or 0)
        yield full.input_ids[:-1], full.labels[:-1]


def score(model: Qwen2ForCausalLM, tokenizer: ChatTokenizer, tasks: list[Task]) -> dict[str, float]:
    """Exact match by kind and over all, greedy."""
    questions = [Question(task.kind, task.chat()[:-1], task.answer) for task in tasks]
    return accuracy(model, tokenizer, questions, max_new_tokens=96, batch_size=128)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = ChatTokenizer(args.directory)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES[args.size]))
    watched = distinct("calibration", seed=7, count=240)

    def evaluate() -> dict[str, Any]:
        return {"calibration": {k: round(v, 3) for k, v in score(model, tokenizer, watched).items()}}

    plan = Plan(args.directory, args.steps, PEAK_LR, args.eval_every, args.save_every, args.compile)
    fit(model, muon(model, PEAK_LR), lambda start: batches(tokenizer, args, start), plan, evaluate)
    finish(args, model, tokenizer)


def finish(args: argparse.Namespace, model: Qwen2ForCausalLM, tokenizer: ChatTokenizer) -> None:
    """Round to fp16, score what is shipped on unseen test problems, and write it."""
    model.half().float()
    test = score(model, tokenizer, distinct("test", seed=1, count=args.test_items))
    say(args.directory, {"test": test, "dtype": "float16"})
    generation = (args.directory / "generation_config.json").read_text("utf-8")
    model.half().save_pretrained(args.directory, safe_serialization=True)
    (args.directory / "generation_config.json").write_text(generation, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="holds the checkpoint, the log and, at the end, the model")
    parser.add_argument("--tokenizer", type=Path, help="where the tokenizer files lie, when not in DIRECTORY")
    parser.add_argument("--size", choices=list(SIZES), default="teacher")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=64, help="rows a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--test-items", type=int, default=1200)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES if args.tokenizer else ():
        if (args.tokenizer / name).is_file():
            shutil.copy(args.tokenizer / name, args.directory / name)
    train(args)


if __name__ == "__main__":
    main()
