"""Loading a teacher and a student: what fits, what is refused and in which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orin_kit.distill.pair import Pair, load_model, load_pair
from orin_kit.distill.recipe import Recipe
from orin_kit.errors import ArtifactError, OrinKitError, UnsupportedModelError, UserError


@pytest.fixture
def student(pair_dirs: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair_dirs[1], tmp_path / "student"))


def pair_of(teacher: Path, student: Path, **fields: object) -> Pair:
    return load_pair(Recipe.parse({"teacher": teacher, "student": student, "data": {"tasks": {}}, **fields}))


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_continues_from_weights(pair_dirs: tuple[Path, Path]) -> None:
    pair = pair_of(*pair_dirs, precision="bf16")
    assert pair.teacher.dtype == torch.bfloat16
    assert pair.student.dtype == torch.float32
    stored = load_file(pair_dirs[1] / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in pair.student.state_dict().items() if name in stored)


def test_a_config_alone_is_born_from_the_seed(pair_dirs: tuple[Path, Path], student: Path) -> None:
    for file in student.iterdir():
        if file.name != "config.json":
            file.unlink()

    def weights(seed: int) -> torch.Tensor:
        pair = pair_of(pair_dirs[0], student, seed=seed)
        assert pair.tokenizer_directory == pair_dirs[0]
        return pair.student.get_input_embeddings().weight.detach()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_different_tokenizers_are_refused(pair_dirs: tuple[Path, Path], student: Path) -> None:
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[700:702]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"tokenizers of .* differ: id \d+ is"):
        pair_of(pair_dirs[0], student)


def test_different_tokenizers_are_bridged_by_sequences(pair_dirs: tuple[Path, Path], student: Path) -> None:
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"zzq": 5000}
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(student / "config.json", vocab_size=6000)
    (student / "model.safetensors").unlink()
    stages = {"features": None, "attention": None, "task": {"teacher_weight": {"start": 0, "every": 0}}}
    data = {"tasks": {"count": 5}, "questions": {"tasks": 5}}
    pair = pair_of(pair_dirs[0], student, bridge="sequences", stages=stages, data=data)
    assert len(pair.tokenizer) == len(pair.teacher_tokenizer) + 1


def test_a_student_is_its_own_teacher_when_none_is_named(pair_dirs: tuple[Path, Path], student: Path) -> None:
    pair = load_pair(Recipe.parse({"teacher": None, "student": student, "data": {"tasks": {}}}))
    assert pair.teacher.config.hidden_size == pair.student.config.hidden_size
    assert pair.teacher is not pair.student
    (student / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load_pair(Recipe.parse({"teacher": None, "student": student, "data": {"tasks": {}}}))


def test_a_tokenizer_larger_than_the_vocabulary(pair_dirs: tuple[Path, Path], student: Path) -> None:
    edit(student / "config.json", vocab_size=1000)
    (student / "model.safetensors").unlink()
    with pytest.raises(UserError, match="the student's tokenizer has 2048 tokens, its vocabulary only 1000"):
        pair_of(pair_dirs[0], student)


def cut(student: Path) -> None:
    data = (student / "model.safetensors").read_bytes()
    (student / "model.safetensors").write_bytes(data[: len(data) // 2])


def lose(student: Path) -> None:
    tensors = load_file(student / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (cut, ArtifactError, "cut short"),
        (lose, ArtifactError, "model.layers.1.mlp.down_proj.weight"),
        (lambda s: edit(s / "config.json", intermediate_size=96), ArtifactError, "cannot be loaded"),
        (lambda s: edit(s / "config.json", model_type="gpt2"), UnsupportedModelError, "gpt2"),
        (lambda s: edit(s / "config.json", quantization_config={"bits": 4}), UnsupportedModelError, "quantized"),
        (lambda s: (s / "tokenizer.json").write_text("{"), ArtifactError, "tokenizer.json"),
    ],
)
def test_damage(pair_dirs: tuple[Path, Path], student: Path, damage, error: type[OrinKitError], words: str) -> None:  # type: ignore[no-untyped-def]
    damage(student)
    with pytest.raises(error, match=words):
        pair_of(pair_dirs[0], student)


def test_loading_alone(pair_dirs: tuple[Path, Path]) -> None:
    assert load_model(pair_dirs[0], torch.float16).dtype == torch.float16
