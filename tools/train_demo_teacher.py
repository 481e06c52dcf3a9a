"""Train the demo teacher, a 3.7 M parameter Qwen2, on our synthetic reasoning tasks.

    python tools/train_demo_teacher.py calibration/demo-teacher
    python tools/train_demo_teacher.py calibration/demo-student --size student --steps 400

The second line makes the student that the demo distils: a small model that was trained a little, by itself.

Every line of the log is a JSON object. A kill loses at most `--save-every` steps: the same command goes on from there.
The learning rate is constant, then falls linearly over the last 30 % of `--steps` (warm-up, stable, decay). Hidden
matrices are trained with Muon, everything else with AdamW. On 2 CPU cores it takes about an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from orin_kit.data.packing import Batch, Example, collate, pack, tokenize_chat
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
WARMUP_STEPS = 100
DECAY_SHARE = 0.3


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
        yield Batch(full.input_ids[:-1], full.labels[:-1], full.attention_mask[:-1])


def optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" in name]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, lr=PEAK_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98)),
    ]


def learning_rate(step: int, steps: int) -> float:
    decay = max(1, round(steps * DECAY_SHARE))
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay)


def score(model: Qwen2ForCausalLM, tokenizer: ChatTokenizer, tasks: list[Task]) -> dict[str, float]:
    """Exact match by kind and over all, greedy."""
    questions = [Question(task.kind, task.chat()[:-1], task.answer) for task in tasks]
    found = accuracy(model, tokenizer, questions, max_new_tokens=96, batch_size=128)
    model.train()
    return found


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = ChatTokenizer(args.directory)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES[args.size]))
    optimizer = optimizers(model)
    checkpoint = args.directory / "train.pt"
    log = (args.directory / "train.log.jsonl").open("a", encoding="utf-8")
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        for o, s in zip(optimizer, state["optimizer"], strict=True):
            o.load_state_dict(s)
    watched = distinct("calibration", seed=7, count=240)
    body = torch.compile(model.model) if args.compile else model.model
    seen, since = 0, time.perf_counter()
    for step, batch in enumerate(batches(tokenizer, args, start), start):
        for group in chain.from_iterable(o.param_groups for o in optimizer):
            group["lr"] = learning_rate(step, args.steps)
        asked = torch.from_numpy(batch.labels) >= 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(input_ids=torch.from_numpy(batch.input_ids)).last_hidden_state
            logits = model.lm_head(hidden[asked])
        loss = F.cross_entropy(logits.float(), torch.from_numpy(batch.labels)[asked])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(norm.item()):
            raise SystemExit(f"step {step}: the gradient is not finite; run again to go on from the last checkpoint")
        for o in optimizer:
            o.step()
            o.zero_grad(set_to_none=True)
        seen += batch.input_ids.size
        done = step + 1
        if done % 50 == 0 or done == args.steps:
            speed, seen = seen / (time.perf_counter() - since), 0
            line: dict[str, Any] = {"step": done, "loss": round(loss.item(), 4), "tokens_per_second": round(speed)}
            if done % args.eval_every == 0 or done == args.steps:
                line["calibration"] = {k: round(v, 3) for k, v in score(model, tokenizer, watched).items()}
            print(json.dumps(line), flush=True)
            print(json.dumps(line), file=log, flush=True)
            since = time.perf_counter()
        if done % args.save_every == 0 or done == args.steps:
            fresh = checkpoint.with_suffix(".new")
            states = [o.state_dict() for o in optimizer]
            torch.save({"step": done, "model": model.state_dict(), "optimizer": states}, fresh)
            fresh.replace(checkpoint)
    finish(args, model, tokenizer, log)


def finish(args: argparse.Namespace, model: Qwen2ForCausalLM, tokenizer: ChatTokenizer, log: Any) -> None:
    """Round to fp16, score what is shipped on unseen test problems, and write it."""
    model.half().float()
    line = {"test": score(model, tokenizer, distinct("test", seed=1, count=args.test_items)), "dtype": "float16"}
    print(json.dumps(line), flush=True)
    print(json.dumps(line), file=log, flush=True)
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
