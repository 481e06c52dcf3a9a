"""A teacher of other tokens: only its words reach the student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from families import DEMO_TEACHER
from orin_kit.data.chat import read_chats
from orin_kit.distill import Recipe, compare, distill
from orin_kit.distill.report import report_table


def test_its_answers_are_learned_and_its_logits_never_asked(
    make_recipe: Callable[..., Recipe], pair_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(DEMO_TEACHER, tmp_path / "teacher"))
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[700:702]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 2048, "content": "<|more|>"})
    student = Path(shutil.copytree(pair_dirs[1], tmp_path / "student"))
    config = json.loads((student / "config.json").read_text()) | {"vocab_size": 2100}  # more than the teacher has
    (student / "config.json").write_text(json.dumps(config))
    (student / "model.safetensors").unlink()
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    task = {"steps": 3, "lora": None, "teacher_weight": {"start": 0, "every": 0}}
    recipe = make_recipe(
        teacher=str(teacher),
        student=str(student),
        bridge="sequences",
        stages={"features": None, "attention": None, "task": task},
        data={"tasks": {"count": 12}, "questions": {"tasks": 12}, "row_length": 96},
        max_new_tokens=90,
    )
    report = distill(recipe, tmp_path / "out", progress=False)
    assert "accuracy" in report["models"]["teacher"] and "held_out_loss" not in report["models"]["teacher"]
    report_table(report)
    assert 6 <= len(read_chats(tmp_path / "out/answers.jsonl")) <= 12
    lines = [json.loads(line) for line in (tmp_path / "out/train.log.jsonl").read_text().splitlines()]
    assert lines and not any("kd" in line for line in lines)
    compare(recipe, tmp_path / "compared", seeds=1, progress=False)
    compare(recipe, tmp_path / "compared", seeds=1, progress=False)  # what is complete is not run again
