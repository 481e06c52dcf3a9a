"""The teacher and the student: loaded, and checked to speak the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orin_kit.distill.recipe import Recipe
from orin_kit.errors import UnsupportedModelError, UserError
from orin_kit.models.pretrained import load_pretrained
from orin_kit.models.spec import read_spec
from orin_kit.models.weights import has_weights
from orin_kit.tokenizer import ChatTokenizer

ANSWERS = "answers.jsonl"  # of the teacher, in artifacts
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Pair:
    """Two models and their tokenizers.

    Attributes:
        teacher: frozen, in the recipe's precision; None where its stored logits do.
        student: fp32 weights; a lower precision is autocast's work.
        tokenizer: the student's.
        teacher_tokenizer: the teacher's; another one only where the teacher does nothing but answer questions.
        tokenizer_directory: where the tokenizer's files lie: the student's, or the teacher's when it has none.
    """

    teacher: PreTrainedModel | None
    student: PreTrainedModel
    tokenizer: ChatTokenizer
    teacher_tokenizer: ChatTokenizer
    tokenizer_directory: Path


def load_pair(recipe: Recipe) -> Pair:
    """Load both models; a student without weights is born from its config, from the recipe's seed.

    Raises:
        ArtifactError: a file is missing or damaged.
        UnsupportedModelError: a family or field that orin-kit does not know, or weights that are quantized already.
        UserError: the tokenizers differ and are not bridged, or have more tokens than a model's vocabulary.
    """
    student, teacher = recipe.student, recipe.teacher or recipe.student
    stored = recipe.teacher_logits
    if stored and (recipe.data.questions is None or (stored / ANSWERS).is_file()):
        return _load_student(recipe, student if (student / "tokenizer.json").is_file() else teacher)
    if recipe.teacher is None and not has_weights(student):
        what = f"teacher: null makes the student its own teacher, but {student} has no weights"
        raise UserError(what, mend="name a teacher, or a student that has learned something")
    sizes = {name: read_spec(directory).vocab_size for name, directory in (("teacher", teacher), ("student", student))}
    source = student if (student / "tokenizer.json").is_file() else teacher
    if recipe.bridge == "none":
        check_tokenizers(teacher, source)
    tokenizers = {"teacher": ChatTokenizer(teacher), "student": ChatTokenizer(source)}
    for name, size in sizes.items():
        if len(tokenizers[name]) > size:
            what = f"the {name}'s tokenizer has {len(tokenizers[name])} tokens, its vocabulary only {size}"
            raise UserError(what, mend="use the tokenizer the model was trained with")
    born = None if has_weights(student) else recipe.seed
    models = load_model(teacher, DTYPES[recipe.precision]), load_model(student, seed=born)
    return Pair(*models, tokenizers["student"], tokenizers["teacher"], source)


def _load_student(recipe: Recipe, source: Path) -> Pair:
    """The student alone, with the tokenizer in `source`."""
    tokenizer, size = ChatTokenizer(source), read_spec(recipe.student).vocab_size
    if len(tokenizer) > size:
        what = f"the student's tokenizer has {len(tokenizer)} tokens, its vocabulary only {size}"
        raise UserError(what, mend="use the tokenizer the model was trained with")
    born = None if has_weights(recipe.student) else recipe.seed
    return Pair(None, load_model(recipe.student, seed=born), tokenizer, tokenizer, source)


def check_convolutions(recipe: Recipe) -> None:
    """Say what a model without attention cannot do.

    Raises:
        UserError: the recipe asks it to.
    """
    models = [recipe.student] if recipe.teacher_logits else [recipe.teacher or recipe.student, recipe.student]
    for model in models:
        if read_spec(model).layout.mixer == "attention":
            continue
        if recipe.stages.attention is not None and recipe.stages.attention.steps:
            what = f"stages.attention: {model} is a convolutional model, it has no attention"
            raise UserError(what, mend="set stages.attention: null")
        if recipe.data.packing:
            what = f"data.packing: the convolutions of {model} would see the chat before in its row"
            raise UserError(what, mend="set data.packing: false")


def load_model(directory: Path, dtype: torch.dtype = torch.float32, seed: int | None = None) -> PreTrainedModel:
    """A model directory as a transformers model; from its config alone when `seed` is given.

    Raises:
        ArtifactError: weights are missing, damaged, or do not belong to the config.
        UnsupportedModelError: the config is not one that orin-kit knows, or the weights are quantized.
    """
    if read_spec(directory).quantization_config:
        raise UnsupportedModelError(f"{directory} holds quantized weights", mend="distil first, then quantize")
    if seed is not None:
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        born: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return born
    return load_pretrained(directory, dtype)


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
    raise UserError(what, mend="choose a pair of one family, or set bridge: sequences (see Recipe)")


def _vocabulary(directory: Path) -> dict[str, int]:
    ChatTokenizer(directory)  # its errors are the user's words
    return dict(Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(with_added_tokens=True))
