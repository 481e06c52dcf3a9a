"""The onnxruntime backend: one session, IO binding, and caches that are allocated once."""

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
from orin_kit.runtime.lora import Adapter, check_fits

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# numpy's types, and ONNX's number of the one that numpy lacks.
ELEMENT: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": 16, "tensor(int8)": np.int8,
}  # fmt: skip


class OnnxBackend:
    """See `Backend`.

    Args:
        directory: an ONNX artifact.
        max_len: tokens a row can hold.
        batch_size: rows.
        threads: intra-op threads; the machine's physical cores when None.
        provider: a key of `PROVIDERS`.

    Raises:
        UserError: the provider is not in this onnxruntime build, or lacks an operator in the graph's types.
        ArtifactError: onnxruntime refuses the model.
    """

    def __init__(
        self, directory: Path, *, max_len: int, batch_size: int = 1, threads: int | None = None, provider: str = "cpu"
    ) -> None:
        self._files = [directory / ONNX_MODEL, directory / ONNX_DATA]
        self._device = "cpu" if provider == "cpu" else provider
        threads = threads or len(os.sched_getaffinity(0))
        self._session = _open(directory / ONNX_MODEL, threads, provider)
        inputs = self._session.get_inputs()
        self._caches = {i.name: i for i in inputs if i.name.startswith("past_key_values.")}
        self._lora_inputs = {i.name: i for i in inputs if i.name.startswith("lora_")}
        self._lora = {name: self._empty_adapter(i) for name, i in self._lora_inputs.items()}
        self._states = {i.name: i for i in inputs if i.name.startswith("past_conv.")}
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
        logits = self._run(ids, counts, counts[:, None] - 1)[:, 0]
        self._commit(counts)
        return logits

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        counts = np.ones(self.batch_size, np.int64)
        self._check_room(counts)
        logits = self._run(tokens.reshape(-1, 1), counts, counts[:, None] - 1)[:, 0]
        self._commit(counts)
        return logits

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.reset(ids.shape[0])
        counts = np.full(ids.shape[0], ids.shape[1])
        self._check_room(counts)
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return self._run(ids, counts, np.ascontiguousarray(positions))  # never committed: the cache stays empty

    def truncate(self, length: int) -> int:
        kept = 0 if self._states else length
        self.lengths = np.where(self.lengths > length, kept, self.lengths)
        return int(self.lengths.max())

    def reset(self, batch_size: int | None = None) -> None:
        batch_size = batch_size or self.batch_size
        if batch_size != self.batch_size:
            self.batch_size = batch_size
            # One buffer is both past and present of attention: the step writes its new tokens into it. A convolution
            # reads its past while it writes: two buffers and two bindings, which take turns.
            self._buffers = {name: [self._allocate(i)] for name, i in self._caches.items()}
            self._buffers |= {name: [self._allocate(i), self._allocate(i)] for name, i in self._states.items()}
            self._bindings = [self._bind(turn) for turn in range(2 if self._states else 1)]
            self._turn = 0
        self.lengths = np.zeros(batch_size, np.int64)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Use a LoRA adapter from here on, or none; empties the cache, whose tokens were read with another."""
        inputs = {} if adapter is None else adapter.inputs
        if adapter is not None:
            check_fits(adapter, self._lora_inputs)
        self.reset()
        for name, i in self._lora_inputs.items():
            self._lora[name] = self._as_input(i, inputs[name]) if name in inputs else self._empty_adapter(i)
        self._bindings = [self._bind(turn) for turn in range(len(self._bindings))]

    def memory(self) -> dict[str, int]:
        cache = sum(buffer.tensor_size_in_bytes() for buffers in self._buffers.values() for buffer in buffers)
        return {"weights": sum(file.stat().st_size for file in self._files if file.is_file()), "kv_cache": cache}

    def _allocate(self, cache: Any) -> Any:
        sizes = {"batch": self.batch_size, "max_len": self.max_len}
        shape = [sizes.get(size, size) for size in cache.shape]
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, ELEMENT[cache.type], self._device, 0)

    def _empty_adapter(self, i: Any) -> Any:
        """An adapter's half of rank 0: A `[in, 0]`, B `[0, out]`."""
        return self._as_input(i, np.zeros([size if isinstance(size, int) else 0 for size in i.shape], np.float32))

    def _as_input(self, i: Any, array: NDArray[np.float32]) -> Any:
        """An array on the device, in an input's type."""
        if i.type == "tensor(bfloat16)":
            from ml_dtypes import bfloat16  # no other type needs it

            cast = array.astype(bfloat16)
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(cast.view(np.uint16), ELEMENT[i.type])
        return ort.OrtValue.ortvalue_from_numpy(array.astype(ELEMENT[i.type]), self._device, 0)

    def _bind(self, turn: int) -> Any:
        binding = self._session.io_binding()  # does not keep the buffers alive: `_buffers` does
        for name, buffers in self._buffers.items():
            binding.bind_ortvalue_input(name, buffers[turn % len(buffers)])
            binding.bind_ortvalue_output(_present(name), buffers[(turn + 1) % len(buffers)])
        for name, value in self._lora.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _run(
        self, ids: NDArray[np.int64], counts: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """One step at `lengths`, `counts` tokens a row: logits fp32 `[batch, n, vocab]` at `positions` `[batch, n]`."""
        binding = self._bindings[self._turn]
        feeds = {"input_ids": ids, "past_lengths": self.lengths, "logit_positions": positions}
        if self._states:
            feeds["input_lengths"] = counts
            self._clear_empty_rows()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")  # anew: the last step's buffer may have another shape
        self._session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[-1].numpy(), np.float32)

    def _commit(self, counts: NDArray[np.int64]) -> None:
        """Take the step that just ran for done. One statement, so that no interrupt can come between."""
        self.lengths, self._turn = self.lengths + counts, (self._turn + 1) % len(self._bindings)

    def _clear_empty_rows(self) -> None:
        """Zero the convolution states of rows that hold no tokens; done here so that emptying a cache is one number."""
        empty = self.lengths == 0
        if empty.any():
            for name in self._states:
                buffer = self._buffers[name][self._turn]
                state = buffer.numpy()
                state[empty] = 0
                buffer.update_inplace(state)

    def _check_room(self, counts: NDArray[np.int64]) -> None:
        longest = int((self.lengths + counts).max())
        if longest > self.max_len:
            what = f"{longest} tokens do not fit a cache of {self.max_len}"
            raise UserError(what, mend="shorten the prompt or raise --max-len")


def _present(past: str) -> str:
    """What the graph calls the output that an input comes from: `present.0.key`, `present_conv.0`."""
    return past.replace("past_key_values", "present").replace("past_conv", "present_conv")


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
        if "NOT_IMPLEMENTED" in first:
            what = f"{PROVIDERS[provider]} cannot run {model}: {first.partition('NOT_IMPLEMENTED : ')[2] or first}"
            raise UserError(what, mend="use another --provider, or export with --activations fp32") from error
        raise ArtifactError(f"onnxruntime cannot open {model}: {first}", mend="export it again") from error
