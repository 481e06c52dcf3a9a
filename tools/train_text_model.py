"""Train a small Qwen2 on real text, GSM8K, from scratch: a model on which quantizers can be compared.

    python tools/train_text_model.py text-model --gsm8k ~/gsm8k
    python tools/train_text_model.py text-model-30m --gsm8k ~/gsm8k --size large --steps 6000

`--gsm8k` holds train.jsonl and test.jsonl. The directory gets a tokenizer of its own, the log, `train.pt` to go on from
after a kill, and, at every save, a whole fp16 checkpoint. All tokens of the chats are learnt, end to end. AdamW,
because most published models were trained with it and the channels that quantizers must look out for come with it.

The log's `test_loss` is of the answers of unseen problems, in nats a token; `unigram_loss` is what a model that knows
only how often each token occurs would get.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_demo_tokenizer as tokenizers_tool
from gsm8k import read_gsm8k
from numpy.typing import NDArray
from pretraining import Batch, Plan, adamw, fit, say
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from orin_kit.data.chat import Chat
from orin_kit.data.packing import collate, tokenize_chat
from orin_kit.tokenizer import ChatTokenizer

COMMON: dict[str, Any] = {
    "head_dim": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SIZES: dict[str, dict[str, Any]] = {  # widths are multiples of 128, so that groups of 128 fit; with 4,096 tokens
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4},  # 5.8 M
    "medium": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},  # 11 M
    "large": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "num_attention_heads": 8},  # 29 M
}
TEST_CHATS = 128  # whose answers are scored while training


def token_rows(streams: Sequence[Sequence[int]], length: int, seed: int) -> NDArray[np.int64]:
    """Chats' tokens in an order drawn with `seed`, end to end, cut to rows `[n, length + 1]`; the rest is dropped.

    A row's last token is the next one's first, so every token of the epoch but the very first is predicted once.
    """
    order = np.random.default_rng(seed).permutation(len(streams))
    ids = np.fromiter(chain.from_iterable(streams[i] for i in order), np.int64)
    count = (len(ids) - 1) // length
    return np.lib.stride_tricks.sliding_window_view(ids, length + 1)[: count * length : length]


def batches(streams: Sequence[Sequence[int]], args: argparse.Namespace, start: int) -> Iterator[Batch]:
    epoch_rows = lru_cache(maxsize=1)(lambda epoch: token_rows(streams, args.length, args.seed + 1000 * epoch))
    steps_per_epoch = (sum(map(len, streams)) - 1) // args.length // args.batch_size
    if not steps_per_epoch:
        raise SystemExit("less text than one batch: lower --batch-size or --length")
    for step in range(start, args.steps):
        epoch, index = divmod(step, steps_per_epoch)
        rows = epoch_rows(epoch)[index * args.batch_size : (index + 1) * args.batch_size]
        yield rows[:, :-1].copy(), rows[:, 1:].copy()


def unigram_loss(streams: Sequence[Sequence[int]], answers: NDArray[np.int64], vocab_size: int) -> float:
    """Mean negative log likelihood of `answers` `[n]` by how often each token occurs in `streams`, plus one."""
    counts = np.bincount(np.fromiter(chain.from_iterable(streams), np.int64), minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[answers].mean())


@torch.no_grad()
def answer_loss(model: Qwen2ForCausalLM, examples: Batch, rows: int = 32) -> float:
    """Mean negative log likelihood of the labels, each chat by itself."""
    model.eval()
    total = 0.0
    for start in range(0, len(examples[0]), rows):
        input_ids, labels = (torch.from_numpy(part[start : start + rows]) for part in examples)
        asked = labels >= 0
        logits = model.lm_head(model.model(input_ids=input_ids).last_hidden_state[asked])
        total += F.cross_entropy(logits.float(), labels[asked], reduction="sum").item()
    return total / int((examples[1] >= 0).sum())


def make_tokenizer(directory: Path, chats: Sequence[Chat], vocab_size: int) -> ChatTokenizer:
    if not (directory / "tokenizer.json").is_file():
        texts = (message.content for chat in chats for message in chat)
        tokenizers_tool.write(tokenizers_tool.train(texts, vocab_size), directory)
    return ChatTokenizer(directory)


def save_model(model: Qwen2ForCausalLM, directory: Path) -> None:
    """A whole fp16 checkpoint, the tokenizer's generation config kept."""
    generation = (directory / "generation_config.json").read_text("utf-8")
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=half, safe_serialization=True)
    config = json.loads((directory / "config.json").read_text("utf-8")) | {"dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (directory / "generation_config.json").write_text(generation, "utf-8")


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    chats, unseen = (read_gsm8k(args.gsm8k / name) for name in ("train.jsonl", "test.jsonl"))
    tokenizer = make_tokenizer(args.directory, chats, args.vocab_size)
    streams = [tokenizer.encode_chat(chat) for chat in chats]
    asked = collate([tokenize_chat(tokenizer, chat) for chat in unseen[:TEST_CHATS]], pad_id=0)
    examples = asked.input_ids, asked.labels
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **COMMON, **SIZES[args.size]))
    unigram = unigram_loss(streams, asked.labels[asked.labels >= 0], len(tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(map(len, streams))
    say(args.directory, {"parameters": parameters, "tokens": tokens, "unigram_loss": round(unigram, 4)})
    fit(
        model,
        adamw(model, args.lr),
        lambda start: batches(streams, args, start),
        Plan(args.directory, args.steps, args.lr, args.eval_every, args.save_every, args.compile),
        lambda: {"test_loss": round(answer_loss(model, examples), 4)},
        lambda step: save_model(model, args.directory),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gsm8k", type=Path, required=True, help="holds train.jsonl and test.jsonl")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="needs a C++ compiler")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
