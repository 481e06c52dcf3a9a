"""The teacher and the student: loaded, and checked to speak the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from orin_kit.errors import ArtifactError, UnsupportedModelError, UserError
from orin_kit.models.spec import read_spec
from orin_kit.models.weights import WeightSource, has_weights
from orin_kit.tokenizer import ChatTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Pair:
    """Two models and their tokenizer.

    Attributes:
        teacher: frozen, in the recipe's precision.
        student: fp32 weights; a lower precision is autocast's work.
        tokenizer_directory: where the tokenizer's files lie: the student's, or the teacher's when it has none.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: ChatTokenizer
    tokenizer_directory: Path


def load_pair(teacher: Path, student: Path, *, precision: str, seed: int) -> Pair:
    """Load both models; a student without weights is born from its config, from `seed`.

    Raises:
        ArtifactError: a file is missing or damaged.
        UnsupportedModelError: a family or field that orin-kit does not know, or weights that are quantized already.
        UserError: the tokenizers differ, or have more tokens than a model's vocabulary.
    """
    sizes = {name: read_spec(directory).vocab_size for name, directory in (("teacher", teacher), ("student", student))}
    source = student if (student / "tokenizer.json").is_file() else teacher
    check_tokenizers(teacher, source)
    tokenizer = ChatTokenizer(source)
    for name, size in sizes.items():
        if len(tokenizer) > size:
            what = f"the tokenizer in {source} has {len(tokenizer)} tokens, the {name}'s vocabulary only {size}"
            raise UserError(what, mend="use the tokenizer the model was trained with")
    born = None if has_weights(student) else seed
    return Pair(load_model(teacher, DTYPES[precision]), load_model(student, seed=born), tokenizer, source)


def load_model(directory: Path, dtype: torch.dtype = torch.float32, seed: int | None = None) -> PreTrainedModel:
    """A model directory as a transformers model; from its config alone when `seed` is given.

    Raises:
        ArtifactError: weights are missing, damaged, or do not belong to the config.
        UnsupportedModelError: the config is not one that orin-kit knows, or the weights are quantized.
    """
    logging.disable_progress_bar()  # ours are enough
    if read_spec(directory).quantization_config:
        raise UnsupportedModelError(f"{directory} holds quantized weights", mend="distil first, then quantize")
    if seed is not None:
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        born: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return born
    WeightSource(directory)  # a file cut short ends here, with its name
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ArtifactError(f"{directory} cannot be loaded: {error}", mend="copy the model again, whole") from error
    missing = sorted(found["missing_keys"])
    if missing:
        what = f"{directory} lacks {len(missing)} tensors of its config, first {missing[0]}"
        raise ArtifactError(what, mend="config.json and the weights must be of one model")
    loaded: PreTrainedModel = model
    return loaded


def check_tokenizers(teacher: Path, student: Path) -> None:
    """Distillation compares predictions token by token: both models must mean the same by every id.

    Raises:
        UserError: the vocabularies differ.
        ArtifactError: a `tokenizer.json` is missing or damaged.
    """
    ours, theirs = _vocabulary(student), _vocabulary(teacher)
    if ours == theirs:
        return
    changed = sorted((i, t) for t, i in ours.items() if theirs.get(t) != i)
    detail = (
        f"id {changed[0][0]} is {changed[0][1]!r} only in the student" if changed else "the teacher has more tokens"
    )
    what = f"the tokenizers of {teacher} ({len(theirs)} tokens) and {student} ({len(ours)}) differ: {detail}"
    raise UserError(what, mend="choose a teacher and a student of one family")


def _vocabulary(directory: Path) -> dict[str, int]:
    ChatTokenizer(directory)  # its errors are the user's words
    return dict(Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(with_added_tokens=True))
