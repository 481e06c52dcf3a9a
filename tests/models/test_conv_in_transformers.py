"""What orin-kit takes for granted of transformers' LFM2 without attention: it trains, is saved, generates, masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from families import DEMO_TEACHER, make_model
from orin_kit.models.spec import read_spec

DEMO_CONV = DEMO_TEACHER.parent / "demo-conv"


def greedy(model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """40 tokens after each prompt, the prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(max_new_tokens=40, do_sample=False, pad_token_id=0)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()


def test_the_demo_student_is_born_trains_is_saved_and_generates(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(DEMO_CONV)
    spec = read_spec(DEMO_CONV)
    assert spec.vocab_size == json.loads((DEMO_TEACHER / "config.json").read_text())["vocab_size"]
    assert 1.1e6 < spec.num_parameters < 1.4e6
    assert spec.num_hidden_layers * (spec.conv_kernel_size - 1) >= 128
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (2, 60))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path)
    assert read_spec(tmp_path) == spec
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = [torch.randint(0, config.vocab_size, (n,)).tolist() for n in (5, 31, 1)]
    assert greedy(loaded, prompts) == [greedy(loaded, [prompt])[0] for prompt in prompts]


@torch.no_grad()
@pytest.mark.parametrize("gap", [22, 23])
def test_one_state_of_masked_tokens_keeps_packed_texts_apart(gap: int) -> None:
    """`conv_L_cache - 1` masked tokens between two texts are as good as two rows, one less is not."""
    model = make_model("conv")
    first, second = torch.randint(0, 2048, (1, 30)), torch.randint(0, 2048, (1, 50))
    row = torch.cat([first, torch.zeros(1, gap, dtype=torch.long), second], 1)
    mask = torch.ones_like(row)
    mask[:, 30 : 30 + gap] = 0
    packed = model(row, attention_mask=mask).logits[:, 30 + gap :]
    assert torch.allclose(packed, model(second).logits, atol=1e-4) == (gap == 23)
