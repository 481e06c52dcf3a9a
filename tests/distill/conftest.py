"""A tiny pair of every difference that matters: width, depth, heads, padded vocabulary."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from orin_kit.distill import Recipe
from orin_kit.tokenizer import TOKENIZER_FILES

TOKENIZER = Path(__file__).parents[2] / "calibration/demo-teacher"
TEACHER = dict(vocab_size=2112, hidden_size=48, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1)
STUDENT = dict(vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


def make_model(directory: Path, seed: int, **config: Any) -> Path:
    """Write a random-weight Qwen2 with the demo tokenizer."""
    torch.manual_seed(seed)
    settings = dict(intermediate_size=64, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(Qwen2Config(**settings, **config))
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (TOKENIZER / name).is_file():
            shutil.copy(TOKENIZER / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def pair_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("pair")
    return make_model(home / "teacher", 1, **TEACHER), make_model(home / "student", 2, **STUDENT)


@pytest.fixture
def make_recipe(pair_dirs: tuple[Path, Path]) -> Callable[..., Recipe]:
    """A recipe of a few steps for each stage; keyword arguments replace whole fields."""

    def make(**fields: Any) -> Recipe:
        stages = {
            "features": {"steps": 3, "learning_rate": 1e-3},
            "attention": {"steps": 3, "learning_rate": 1e-3, "calibration_batches": 2},
            "task": {"steps": 4, "learning_rate": 1e-3, "teacher_weight": {"every": 2}},
        }
        base: dict[str, Any] = {
            "teacher": str(pair_dirs[0]),
            "student": str(pair_dirs[1]),
            "data": {"tasks": {"count": 60}, "row_length": 64},
            "stages": stages,
            "batch_size": 4,
            "checkpoint_every": 2,
            "log_every": 1,
            "watched_items": 12,
            "test_items": 6,
            "max_new_tokens": 4,
        }
        return Recipe.parse(base | fields)

    return make
