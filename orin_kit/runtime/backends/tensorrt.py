"""The TensorRT backend: an engine whose cache never leaves the GPU, decoding from a CUDA graph.

Two contexts (four where caches take turns) share one working memory: they run one after the other on one stream. All
of TensorRT, pycuda and the plugin library is called through `orin_kit/engine/`; what is here needs none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orin_kit.engine.cuda import Gpu
from orin_kit.engine.plan import DECODE, PREFILL, Binding, Sizes, bindings_of, is_cache, past_of
from orin_kit.engine.replay import Replay
from orin_kit.engine.trt import Shape
from orin_kit.errors import ArtifactError, UserError
from orin_kit.inspect.onnx_file import VALUE_BYTES, Value
from orin_kit.runtime.lora import Adapter, check_fits

# TensorRT's types as manifests name them, and in numpy; bfloat16 travels as its bits.
DTYPES = {"FLOAT": "F32", "HALF": "F16", "BF16": "BF16", "INT8": "I8", "INT32": "I32", "INT64": "I64"}
FED = ("input_ids", "past_lengths", "logit_positions", "input_lengths")  # int64, from the host at every step
Ports = tuple[tuple[Value, ...], tuple[Value, ...]]  # inputs, outputs


class ContextLike(Protocol):
    """See `orin_kit.engine.trt.Context`."""

    def set_shape(self, name: str, shape: Shape) -> None: ...
    def set_address(self, name: str, address: int) -> None: ...
    def check(self) -> None: ...
    def enqueue(self, stream: int) -> None: ...


class EngineLike(Protocol):
    """See `orin_kit.engine.trt.Engine`."""

    @property
    def names(self) -> list[str]: ...
    def dtype(self, name: str) -> str: ...
    def is_on_device(self, name: str) -> bool: ...
    def context_bytes(self, profile: int) -> int: ...
    def context(self, profile: int, memory: int, size: int, stream: int) -> ContextLike: ...


class Argmax(Protocol):
    """See `orin_kit.engine.plugin_library.PluginLibrary`."""

    def argmax_workspace(self, rows: int, vocab: int) -> int: ...
    def argmax(
        self, logits: int, rows: int, vocab: int, index: int, workspace: int, workspace_bytes: int, stream: int
    ) -> None: ...


class TensorRTBackend:
    """See `Backend`. Used from the thread that made it.

    Args:
        engine: deserialized.
        gpu: where it runs.
        ports: inputs and outputs of its graph.
        sizes: that it was built for; `max_len` may be less than that.
        cache_writing: see `compatibility.cache_writing`.
        argmax: chooses the likeliest token on the device; without it `decode_greedy` does so on the host.
        batch_size: rows.
        weights_bytes: of the engine's file.
        name: what runs, for reports.
        capture: decode from a CUDA graph; an engine that streams weights cannot be captured.

    Raises:
        ArtifactError: the engine's inputs and outputs are not those of `ports`.
        UserError: no memory, or more rows than it was built for.
    """

    def __init__(
        self,
        engine: EngineLike,
        gpu: Gpu,
        ports: Ports,
        sizes: Sizes,
        cache_writing: str,
        *,
        max_len: int,
        batch_size: int = 1,
        argmax: Argmax | None = None,
        weights_bytes: int = 0,
        name: str = "TensorRT",
        capture: bool = True,
    ) -> None:
        self._engine, self._gpu, self._ports, self._sizes = engine, gpu, ports, sizes
        self._writing, self._argmax, self._capture = cache_writing, argmax, capture
        self._weights_bytes = weights_bytes
        _check_ports(engine, ports)
        self._lora = {value.name: value for value in ports[0] if value.name.startswith("lora_")}
        self._fed = [value.name for value in ports[0] if value.name in FED]
        self.name, self.max_len = name, max_len
        self.vocab_size = int(ports[1][0].shape[-1])
        self._adapter: Adapter | None = None
        self.batch_size = 0
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        size = max(engine.context_bytes(PREFILL), engine.context_bytes(DECODE))
        self._scratch, self._scratch_bytes = gpu.allocate(size), size
        self.reset(batch_size)

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See `Backend`; in pieces of the tokens that the prefill profile takes."""
        counts = np.array([len(row) for row in rows], np.int64)
        if len(rows) != self.batch_size or not counts.all():
            raise ValueError(f"prefill wants {self.batch_size} rows of at least one token")
        if self.batch_size > 1 and self.lengths.any():
            raise ValueError("only a batch of one can be continued by a piece of prompt")
        self._check_room(counts)
        logits = np.empty((self.batch_size, self.vocab_size), np.float32)
        with _Pieces(self) as pieces:
            for first in range(0, int(counts.max()), self._sizes.prefill):
                here = np.clip(counts - first, 0, self._sizes.prefill)  # tokens of each row in this piece
                ids = np.zeros((self.batch_size, int(here.max())), np.int64)
                for row, tokens in enumerate(rows):
                    ids[row, : here[row]] = tokens[first : first + int(here[row])]
                ends = np.maximum(here - 1, 0)[:, None]
                given = pieces.run(ids, here, ends, self.lengths + np.minimum(counts, first))
                last = (here > 0) & (counts <= first + self._sizes.prefill)
                logits[last] = given[last, 0]
        self.lengths = self.lengths + counts
        return logits

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self._step(tokens, "logits")
        return np.array(self._logits[: self.batch_size * self.vocab_size].reshape(self.batch_size, -1), np.float32)

    def decode_greedy(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Append one token `[batch]` to every row; the likeliest next ones, int64 `[batch]`.

        With the plugin library only they leave the GPU.

        Raises:
            UserError: the cache is full.
        """
        if self._argmax is None:
            return np.asarray(np.argmax(self.decode(tokens), axis=-1), np.int64)
        self._step(tokens, "tokens")
        return np.array(self._tokens, np.int64)

    def score(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.reset(ids.shape[0])
        self._check_room(np.full(ids.shape[0], ids.shape[1]))
        logits = np.empty((*ids.shape, self.vocab_size), np.float32)
        with _Pieces(self) as pieces:  # never committed: the cache stays empty
            for first in range(0, ids.shape[1], self._sizes.logits):
                piece = ids[:, first : first + self._sizes.logits]
                counts = np.full(len(ids), piece.shape[1])
                positions = np.broadcast_to(np.arange(piece.shape[1]), piece.shape)
                logits[:, first : first + piece.shape[1]] = pieces.run(piece, counts, positions, self.lengths + first)
        return logits

    def truncate(self, length: int) -> int:
        kept = 0 if self._states else length
        self.lengths = np.where(self.lengths > length, kept, self.lengths)
        return int(self.lengths.max())

    def reset(self, batch_size: int | None = None) -> None:
        batch_size = batch_size or self.batch_size
        if batch_size > self._sizes.max_batch:
            what = f"{batch_size} rows are more than the engine's {self._sizes.max_batch}"
            raise UserError(what, mend=f"build it with --max-batch {batch_size}")
        if batch_size != self.batch_size:
            self._allocate(batch_size)
        self.lengths = np.zeros(batch_size, np.int64)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """See `Backend`. An adapter of a lower rank than the engine's is padded with zeros, which add nothing."""
        if adapter is not None:
            check_fits(adapter, self._lora)
            rank = max(
                (array.shape[1] for name, array in adapter.inputs.items() if name.startswith("lora_A")), default=0
            )
            if rank > self._sizes.lora_rank:
                what = f"{adapter.directory} has rank {rank}, the engine takes {self._sizes.lora_rank}"
                raise UserError(what, mend=f"build it with --lora-rank {rank}")
        self.reset()
        self._adapter = adapter
        self._load_adapter()

    def memory(self) -> dict[str, int]:
        cache = sum(binding.bytes for binding in self._bindings.values() if is_cache(binding) and not binding.shares)
        return {"weights": self._weights_bytes, "kv_cache": cache}

    @property
    def captured(self) -> bool:
        """Whether decoding runs from a CUDA graph by now."""
        return any(step.captured for step in self._replays.values())

    def _allocate(self, batch_size: int) -> None:
        """Buffers, contexts and steps for a number of rows."""
        gpu, vocab = self._gpu, self.vocab_size
        sizes = replace(self._sizes, max_batch=batch_size)
        self._replays: dict[tuple[int, str], Replay] = {}
        self._bindings = {b.name: b for b in bindings_of(*self._ports, sizes, self._writing)}
        self._memory = {name: gpu.allocate(b.bytes) for name, b in self._bindings.items() if not b.shares}
        self._states = [name for name in self._bindings if name.startswith("past_conv.")]
        # An output that does not share its input's buffer: the two take turns as input and output.
        self._turning = [n for n, b in self._bindings.items() if not b.is_input and is_cache(b) and not b.shares]
        self._turns, self._turn = 2 if self._turning else 1, 0
        host = {"input_ids": sizes.prefill, "logit_positions": sizes.logits}
        self._host = {name: gpu.pinned(batch_size * host.get(name, 1), np.int64) for name in self._fed}
        self._logits = gpu.pinned(batch_size * sizes.logits * vocab, np.float32)
        self._tokens = gpu.pinned(batch_size, np.int64)
        if self._argmax is not None:
            self._index = gpu.allocate(batch_size * 8)
            self._argmax_bytes = self._argmax.argmax_workspace(batch_size, vocab)
            self._argmax_memory = gpu.allocate(self._argmax_bytes)
        self.batch_size = batch_size
        self._load_adapter()
        self._contexts = {(p, turn): self._context(p, turn) for p in (PREFILL, DECODE) for turn in range(self._turns)}
        for turn in range(self._turns):
            self._set_shapes(DECODE, turn, tokens=1, logits=1)
            for result in ("logits", "tokens") if self._argmax else ("logits",):
                self._replays[turn, result] = self._replay(turn, result)
        gpu.wait()

    def _context(self, profile: int, turn: int) -> ContextLike:
        context = self._engine.context(profile, int(self._scratch), self._scratch_bytes, self._gpu.stream)
        for name, binding in self._bindings.items():
            context.set_address(name, self._address(binding, turn))
        for name, binding in self._bindings.items():
            if binding.is_input and name not in self._fed:
                context.set_shape(name, binding.greatest[profile])
        return context

    def _address(self, binding: Binding, turn: int) -> int:
        name = binding.shares or binding.name
        if turn and is_cache(binding) and not binding.shares:
            partners = {past_of(present): present for present in self._turning}
            name = partners.get(name) or (past_of(name) if name in self._turning else name)
        return int(self._memory[name])

    def _set_shapes(self, profile: int, turn: int, *, tokens: int, logits: int) -> None:
        context, batch = self._contexts[profile, turn], self.batch_size
        shapes = {"input_ids": (batch, tokens), "logit_positions": (batch, logits)}
        for name in self._fed:
            context.set_shape(name, shapes.get(name, (batch,)))
        context.check()

    def _replay(self, turn: int, result: str) -> Replay:
        """One decoded token a row: inputs up, the engine, logits or their argmax down."""
        gpu, rows = self._gpu, self.batch_size
        context, logits = self._contexts[DECODE, turn], int(self._memory["logits"])

        def work() -> None:
            for name in self._fed:
                gpu.upload(int(self._memory[name]), self._host[name][:rows])
            context.enqueue(gpu.stream)
            if result == "logits":
                gpu.download(self._logits[: rows * self.vocab_size], logits)
                return
            assert self._argmax is not None
            index, workspace = int(self._index), int(self._argmax_memory)
            self._argmax.argmax(logits, rows, self.vocab_size, index, workspace, self._argmax_bytes, gpu.stream)
            gpu.download(self._tokens, index)

        return Replay(gpu, work, capture=self._capture)

    def _step(self, tokens: NDArray[np.int64], result: str) -> None:
        """Decode one token a row; the result lies in pinned memory."""
        counts = np.ones(self.batch_size, np.int64)
        self._check_room(counts)
        self._clear_empty_rows(self.lengths)
        self._feed(tokens.reshape(-1, 1), counts, np.zeros_like(counts)[:, None], self.lengths)
        self._replays[self._turn, result].run()
        self._gpu.wait()
        self._commit(counts)

    def _commit(self, counts: NDArray[np.int64]) -> None:
        """Take the step that just ran for done. One statement, so that no interrupt can come between."""
        self.lengths, self._turn = self.lengths + counts, (self._turn + 1) % self._turns

    def _prefill_step(
        self, ids: NDArray[np.int64], counts: NDArray[np.int64], positions: NDArray[np.int64], past: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """One step of the prefill profile: logits fp32 `[batch, n, vocab]` at `positions` `[batch, n]`."""
        gpu, (rows, tokens), wanted = self._gpu, ids.shape, positions.shape[1]
        self._clear_empty_rows(past)
        sizes = self._feed(ids, counts, positions, past)
        self._set_shapes(PREFILL, self._turn, tokens=tokens, logits=wanted)
        for name in self._fed:
            gpu.upload(int(self._memory[name]), self._host[name][: sizes[name]])
        self._contexts[PREFILL, self._turn].enqueue(gpu.stream)
        logits = self._logits[: rows * wanted * self.vocab_size]
        gpu.download(logits, int(self._memory["logits"]))
        gpu.wait()
        return np.array(logits.reshape(rows, wanted, -1), np.float32)

    def _feed(
        self, ids: NDArray[np.int64], counts: NDArray[np.int64], positions: NDArray[np.int64], past: NDArray[np.int64]
    ) -> dict[str, int]:
        """Fill the pinned inputs; how many numbers each has."""
        values = {"input_ids": ids, "past_lengths": past, "logit_positions": positions, "input_lengths": counts}
        for name in self._fed:
            self._host[name][: values[name].size] = values[name].ravel()
        return {name: values[name].size for name in self._fed}

    def _clear_empty_rows(self, past: NDArray[np.int64]) -> None:
        """Zero the convolution states of rows that hold no tokens: emptying a cache is one number."""
        if not self._states or past.all():
            return
        for name in self._states:
            binding = self._bindings[name]
            row_bytes = VALUE_BYTES[binding.dtype] * math.prod(binding.greatest[DECODE][1:])
            for row in np.flatnonzero(past == 0):
                self._gpu.zero(self._address(binding, self._turn) + int(row) * row_bytes, row_bytes)

    def _load_adapter(self) -> None:
        """Put the adapter's inputs on the GPU; zeros without one."""
        inputs = self._adapter.inputs if self._adapter else {}
        kept = []  # pinned until the copies have run
        for name in self._lora:
            binding = self._bindings[name]
            array = np.zeros(binding.greatest[DECODE], np.float32)
            if name in inputs:
                rows, columns = inputs[name].shape
                array[:rows, :columns] = inputs[name]
            bits = _bits(array, binding.dtype)
            pinned = self._gpu.pinned(bits.size, bits.dtype)
            pinned[:] = bits.ravel()
            self._gpu.upload(int(self._memory[name]), pinned)
            kept.append(pinned)
        self._gpu.wait()

    def _check_room(self, counts: NDArray[np.int64]) -> None:
        longest = int((self.lengths + counts).max())
        if longest > self.max_len:
            what = f"{longest} tokens do not fit a cache of {self.max_len}"
            raise UserError(what, mend="shorten the prompt or raise --max-len")


class _Pieces:
    """Several prefill steps as one: what they leave behind counts when all are done.

    Caches that take turns lose the old state with the second step, so rows are emptied when a later one fails.
    """

    def __init__(self, backend: TensorRTBackend) -> None:
        self._backend, self._done = backend, 0

    def __enter__(self) -> _Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        backend = self._backend
        if kind is not None and self._done and backend._turns > 1:
            backend.lengths = np.zeros_like(backend.lengths)

    def run(
        self, ids: NDArray[np.int64], counts: NDArray[np.int64], positions: NDArray[np.int64], past: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """See `TensorRTBackend._prefill_step`."""
        backend = self._backend
        logits = backend._prefill_step(ids, counts, positions, past)
        self._done, backend._turn = self._done + 1, (backend._turn + 1) % backend._turns
        return logits


def _check_ports(engine: EngineLike, ports: Ports) -> None:
    values = {value.name: value for side in ports for value in side}
    mend = "build it again with orin-kit build-engine"
    strange = set(values) ^ set(engine.names)
    if strange:
        raise ArtifactError(f"the engine and its graph differ in {min(strange)}", mend=mend)
    for name, value in values.items():
        if DTYPES.get(engine.dtype(name)) != value.dtype:
            raise ArtifactError(f"the engine has {name} in {engine.dtype(name)}, its graph in {value.dtype}", mend=mend)
        if not engine.is_on_device(name):
            raise ArtifactError(f"the engine wants {name} on the host, which no graph of ours does", mend=mend)


def _bits(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """An array as a buffer of a type holds it."""
    if dtype == "BF16":
        from ml_dtypes import bfloat16  # no other type needs it

        return array.astype(bfloat16).view(np.uint16)
    return array.astype({"F16": np.float16, "F32": np.float32}[dtype])
