"""The onnxruntime backend: one session, IO binding, and a KV cache that is allocated once and written in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError, OrinKitError, UserError
from orin_kit.manifest import ONNX_DATA, ONNX_MODEL

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ELEMENT = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxBackend:
    """See `Backend`.

    Args:
        directory: an ONNX artifact.
        max_len: tokens a row can hold.
        batch_size: rows.
        threads: intra-op threads; the machine's physical cores when None.
        provider: a key of `PROVIDERS`.

    Raises:
        UserError: the provider is not in this onnxruntime build.
        ArtifactError: onnxruntime refuses the model.
    """

    def __init__(
        self, directory: Path, *, max_len: int, batch_size: int = 1, threads: int | None = None, provider: str = "cpu"
    ) -> None:
        self._files = [directory / ONNX_MODEL, directory / ONNX_DATA]
        self._device = "cpu" if provider == "cpu" else provider
        threads = threads or len(os.sched_getaffinity(0))
        self._session = _open(directory / ONNX_MODEL, threads, provider)
        inputs = {i.name: i for i in self._session.get_inputs()}
        self._caches = [name for name in inputs if name.startswith("past_key_values.")]
        first = inputs[self._caches[0]]
        self._cache_dtype = ELEMENT[first.type]
        self._heads, self._head_dim = first.shape[1], first.shape[3]
        self.name = f"onnxruntime {ort.__version__} {PROVIDERS[provider]}, {threads} threads"
        self.vocab_size = int(self._session.get_outputs()[0].shape[-1])
        self.max_len = max_len
        self.batch_size = 0
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self.reset(batch_size)

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        counts = np.array([len(row) for row in rows], np.int64)
        if len(rows) != self.batch_size or not counts.all():
            raise ValueError(f"prefill wants {self.batch_size} rows of at least one token")
        if self.batch_size > 1 and self.lengths.any():
            raise ValueError("only a batch of one can be continued by a piece of prompt")
        self._check_room(counts)
        ids = np.zeros((len(rows), int(counts.max())), np.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
        logits = self._run(ids, counts[:, None] - 1)[:, 0]
        self.lengths += counts
        return logits

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self._check_room(np.ones(self.batch_size, np.int64))
        logits = self._run(tokens.reshape(-1, 1), np.zeros((self.batch_size, 1), np.int64))[:, 0]
        self.lengths += 1
        return logits

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.reset(ids.shape[0])
        self._check_room(np.full(ids.shape[0], ids.shape[1]))
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return self._run(ids, np.ascontiguousarray(positions))

    def truncate(self, length: int) -> None:
        self.lengths = np.minimum(self.lengths, length)

    def reset(self, batch_size: int | None = None) -> None:
        batch_size = batch_size or self.batch_size
        if batch_size != self.batch_size:
            self.batch_size = batch_size
            shape = [batch_size, self._heads, self.max_len, self._head_dim]
            self._binding = self._session.io_binding()
            self._buffers = []  # onnxruntime does not keep them alive
            for name in self._caches:
                # One buffer is both past and present: the step writes its new tokens into it.
                buffer = ort.OrtValue.ortvalue_from_shape_and_type(shape, self._cache_dtype, self._device, 0)
                self._buffers.append(buffer)
                self._binding.bind_ortvalue_input(name, buffer)
                self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        self.lengths = np.zeros(batch_size, np.int64)

    def memory(self) -> dict[str, int]:
        values = self.batch_size * self._heads * self.max_len * self._head_dim
        cache = len(self._caches) * values * np.dtype(self._cache_dtype).itemsize
        return {"weights": sum(file.stat().st_size for file in self._files if file.is_file()), "kv_cache": cache}

    def _run(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """One step at `lengths`: logits fp32 `[batch, n, vocab]` at `positions` `[batch, n]`."""
        binding = self._binding
        for name, array in (("input_ids", ids), ("past_lengths", self.lengths), ("logit_positions", positions)):
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")  # anew: the last step's buffer may have another shape
        self._session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[-1].numpy(), np.float32)

    def _check_room(self, counts: NDArray[np.int64]) -> None:
        longest = int((self.lengths + counts).max())
        if longest > self.max_len:
            what = f"{longest} tokens do not fit a cache of {self.max_len}"
            raise UserError(what, mend="shorten the prompt or raise --max-len")


def _open(model: Path, threads: int, provider: str) -> Any:
    if PROVIDERS[provider] not in ort.get_available_providers():
        what = f"this onnxruntime has no {PROVIDERS[provider]}"
        raise UserError(what, mend="use --provider cpu, or install an onnxruntime-gpu build")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(model), options, providers=[PROVIDERS[provider]])
    except MemoryError as error:
        raise OrinKitError(f"no memory for {model}", mend="use a smaller model or INT4") from error
    except Exception as error:  # onnxruntime's own exceptions share no base class
        first = str(error).strip().splitlines()[0]
        raise ArtifactError(f"onnxruntime cannot open {model}: {first}", mend="export it again") from error
