"""Train the demo family's byte-level BPE tokenizer and write it, with its chat template, into a directory.

    python tools/train_demo_tokenizer.py calibration/demo-tokenizer

The text is our own reasoning tasks plus the English of Python's language reference (`pydoc_data.topics`, on every
machine that has Python), so that a user's free text is not spelled out byte by byte. Digits stand alone, as in Qwen2.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from orin_kit.data.tasks import generate

VOCAB_SIZE = 2048
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THOUGHT = ("<think>", "</think>")  # plain text to a reader, so decoding keeps them

# Qwen2's own split: https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/tokenizer.json
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens: `SPECIALS` come first, `THOUGHT` last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THOUGHT),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in THOUGHT])
    return tokenizer


def write(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer, its chat template and its stop tokens, as transformers and orin-kit read them."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = {"eos_token_id": stop, "pad_token_id": stop[1], "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")


def demo_texts(tasks: int = 20_000) -> list[str]:
    problems = islice(generate("train", seed=0), tasks)
    texts = [f"{task.question}\n{task.steps}\n{task.answer}" for task in problems]
    prose = [topics[name] for name in sorted(topics)]
    random.Random(0).shuffle(texts)
    return texts + prose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    tokenizer = train(demo_texts(), VOCAB_SIZE)
    write(tokenizer, directory)
    print(f"{tokenizer.get_vocab_size()} tokens in {directory}")


if __name__ == "__main__":
    main()
