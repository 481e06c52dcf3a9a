"""The teacher as a transformers checkpoint: batches padded on the left, one random state a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from orin_kit.errors import UnsupportedModelError
from orin_kit.models.pretrained import left_padded, load_pretrained
from orin_kit.models.spec import read_spec
from orin_kit.runtime.sampler import Sampling
from orin_kit.tokenizer import ChatTokenizer
from orin_kit.traces.teacher import Reply


class TransformersTeacher:
    """See `Teacher`. In bf16 on a GPU, in fp32 on a CPU; a batch of other rows gives a row other random numbers."""

    def __init__(self, directory: Path, *, threads: int | None) -> None:
        spec = read_spec(directory)
        if spec.quantization_config:
            what = f"{directory} holds quantized weights"
            raise UnsupportedModelError(what, mend=f"run orin-kit export {directory} and name the ONNX artifact")
        if threads:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._model: Any = load_pretrained(directory, dtype).to(device).eval()
        self._stop_ids = ChatTokenizer(directory).stop_ids
        self._context = spec.max_position_embeddings

    @torch.no_grad()
    def reply(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], max_new_tokens: int
    ) -> list[Reply]:
        ids, mask = left_padded(prompts, self._model.device)
        width = ids.shape[1]
        config = GenerationConfig(
            max_new_tokens=min(max_new_tokens, self._context - width + 1),  # the last one is not read again
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_k=0 if sampling.temperature else None,  # transformers' default would keep 50
            top_p=sampling.top_p if sampling.temperature else None,
            eos_token_id=sorted(self._stop_ids) or None,
            pad_token_id=0,
        )
        seed = int(hashlib.sha256(repr(list(seeds)).encode()).hexdigest()[:15], 16)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            out = self._model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return [self._until_stop(row) for row in out[:, width:].tolist()]

    def _until_stop(self, row: list[int]) -> Reply:
        end = next((i for i, token in enumerate(row) if token in self._stop_ids), None)
        return Reply(row[:end], end is not None)
