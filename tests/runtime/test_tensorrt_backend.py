"""The TensorRT backend's own logic: pieces of prompts, caches that take turns, CUDA graphs, adapters, the argmax.

NEITHER TENSORRT NOR A GPU RUNS HERE. What stands in for them does its work late, as a stream does, refuses what
TensorRT documents that it refuses, and computes each step of a trt_native graph with onnxruntime; the expected logits
are those of the onnxruntime backend and its own dialect. That the real ones do the same is not shown by these tests
(docs/engines.md says what was run).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import DTypeLike, NDArray

from families import save_model
from orin_kit.engine.build import Options, bindings_json, plan_engine
from orin_kit.engine.compatibility import PLUGIN, SELECT
from orin_kit.engine.plan import Plan, make_plan, past_of
from orin_kit.engine.trt import Range, Shape
from orin_kit.errors import ArtifactError, OrinKitError, UserError
from orin_kit.export.export import export
from orin_kit.inspect.onnx_file import OnnxFile, read_onnx
from orin_kit.manifest import write_artifact
from orin_kit.models.spec import read_spec
from orin_kit.runtime.backend import Backend
from orin_kit.runtime.backends.onnx import OnnxBackend
from orin_kit.runtime.backends.tensorrt import TensorRTBackend
from orin_kit.runtime.backends.tensorrt_engine import read_ports
from orin_kit.runtime.lora import Adapter
from orin_kit.runtime.runtime import open_runtime

RNG = np.random.default_rng()
TENSORRT = {"F32": "FLOAT", "F16": "HALF", "I64": "INT64", "I8": "INT8"}
NUMPY: dict[str, DTypeLike] = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I8": np.int8}


class Memory(int):
    """An address."""


class LateGpu:
    """A stream: nothing is done before `wait`, and copies read what lies in host memory then."""

    stream = 7

    def __init__(self) -> None:
        self.bytes = np.full(1 << 26, 0xAB, np.uint8)  # nobody may count on zeros that they did not ask for
        self.used = 256
        self.pending: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.launches = self.captures = 0
        self.refuse_capture = False

    def give(self, work: Callable[[], None]) -> None:
        (self.pending if self.recording is None else self.recording).append(work)

    def allocate(self, size: int) -> Memory:
        address, self.used = self.used, self.used + -(-size // 256) * 256
        self.zero(address, size)
        return Memory(address)

    def pinned(self, count: int, dtype: DTypeLike) -> NDArray[Any]:
        return np.zeros(count, dtype)

    def view(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[address : address + size].view(dtype).reshape(shape)

    def zero(self, address: int, size: int) -> None:
        self.give(lambda: self.bytes[address : address + size].fill(0))

    def upload(self, address: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        self.give(lambda: self.view(address, array.shape, array.dtype).__setitem__(..., array))

    def download(self, array: NDArray[Any], address: int) -> None:
        assert (array.flags.c_contiguous and array.base is not None) or array.ndim == 1
        self.give(lambda: array.__setitem__(..., self.view(address, array.shape, array.dtype)))

    def wait(self) -> None:
        while self.pending:
            self.pending.pop(0)()

    def capture(self, work: Callable[[], None]) -> Graph:
        self.recording = recorded = []
        try:
            work()
        finally:
            self.recording = None
        if self.refuse_capture:
            raise OrinKitError("operation not permitted when stream is capturing")
        self.captures += 1
        return Graph(self, recorded)


class Graph:
    def __init__(self, gpu: LateGpu, work: list[Callable[[], None]]) -> None:
        self.gpu, self.work = gpu, work

    def launch(self) -> None:
        self.gpu.launches += 1
        self.gpu.pending.extend(self.work)


class Engine:
    """An engine by onnxruntime, with the profiles of a plan."""

    def __init__(self, onnx: Path, graph: OnnxFile, plan: Plan, gpu: LateGpu) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = ort.InferenceSession(str(onnx / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.graph, self.plan, self.gpu = graph, plan, gpu
        self.values = {value.name: value for value in (*graph.inputs, *graph.outputs)}

    @property
    def names(self) -> list[str]:
        return list(self.values)

    def dtype(self, name: str) -> str:
        return TENSORRT[self.values[name].dtype]

    def is_on_device(self, name: str) -> bool:
        return True

    def context_bytes(self, profile: int) -> int:
        return 1000

    def context(self, profile: int, memory: int, size: int, stream: int) -> Context:
        assert memory % 256 == 0 and size >= self.context_bytes(profile)
        return Context(self, self.plan.profiles[profile])


class Context:
    def __init__(self, engine: Engine, profile: Mapping[str, Range]) -> None:
        self.engine, self.profile = engine, profile
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.warm = False

    def set_shape(self, name: str, shape: Shape) -> None:
        least, _, greatest = self.profile[name]
        assert len(least) == len(shape)
        assert all(low <= size <= high for low, size, high in zip(least, shape, greatest, strict=True)), (name, shape)
        self.warm = self.warm and self.shapes.get(name) == shape
        self.shapes[name] = tuple(shape)

    def set_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def check(self) -> None:
        assert set(self.shapes) == {value.name for value in self.engine.graph.inputs}

    def enqueue(self, stream: int) -> None:
        gpu = self.engine.gpu
        assert stream == gpu.stream
        self.check()
        assert gpu.recording is None or self.warm, "a capture needs a plain run of the same shapes before"
        self.warm = True
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        gpu.give(lambda: self.run(shapes, addresses))

    def run(self, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        engine, gpu = self.engine, self.engine.gpu
        inputs = {
            value.name: gpu.view(addresses[value.name], shapes[value.name], NUMPY[value.dtype]).copy()
            for value in engine.graph.inputs
        }
        results = engine.session.run(None, inputs)
        for value, result in zip(engine.graph.outputs, results, strict=True):
            address = addresses[value.name]
            if engine.plan.cache_writing == PLUGIN and value.name.startswith("present."):
                assert address == addresses[past_of(value.name)]
            else:
                assert address not in {addresses[name] for name in inputs}, "an output over an input"
            gpu.view(address, result.shape, result.dtype)[...] = result


class HostArgmax:
    def __init__(self, gpu: LateGpu) -> None:
        self.gpu, self.calls = gpu, 0

    def argmax_workspace(self, rows: int, vocab: int) -> int:
        return 64

    def argmax(
        self, logits: int, rows: int, vocab: int, index: int, workspace: int, workspace_bytes: int, stream: int
    ) -> None:
        def work() -> None:
            self.calls += 1
            best = self.gpu.view(logits, (rows, vocab), np.float32).argmax(-1)
            self.gpu.view(index, (rows,), np.int64)[...] = best

        self.gpu.give(work)


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention": ("qwen2", dict(num_hidden_layers=2), {}),
    "conv": ("conv", dict(num_hidden_layers=2), {}),
    "lora": ("qwen3", dict(num_hidden_layers=1), dict(lora_targets=["q_proj", "down_proj"])),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(request.param, tmp_path_factory.mktemp(request.param))


def exported(name: str, home: Path) -> Path:
    family, changes, options = MODELS[name]
    save_model(home / "hf", family, seed=int(RNG.integers(1000)), **changes)
    for dialect, out in (("ort", "ort"), ("trt_native", "onnx")):
        export(home / "hf", home / out, precision="fp32", dialect=dialect, max_len=64, progress=False, **options)
    return home / "onnx"


def opened(onnx: Path, writing: str = PLUGIN, *, device_argmax: bool = True, **options: Any) -> TensorRTBackend:
    """The backend on stand-ins; options are those of `Options`."""
    graph, gpu = read_onnx(onnx / "model.onnx"), LateGpu()
    chosen = dict(max_batch=3, max_len=48, prefill=7, opt_prefill=4, logits=5)
    if any(value.name.startswith("lora_") for value in graph.inputs):
        chosen["lora_rank"] = 6
    from orin_kit.engine.plan import Sizes

    sizes = Sizes(**{**chosen, "lora_rank": chosen.get("lora_rank", 0), **options})
    plan = make_plan(graph, read_spec(onnx), sizes, writing)
    argmax = HostArgmax(gpu) if device_argmax else None
    engine = Engine(onnx, graph, plan, gpu)
    backend = TensorRTBackend(
        engine, gpu, (graph.inputs, graph.outputs), sizes, writing, max_len=48, argmax=argmax, weights_bytes=123
    )
    backend.gpu, backend.plan = gpu, plan  # type: ignore[attr-defined]
    return backend


def expected(onnx: Path) -> OnnxBackend:
    return OnnxBackend(onnx.parent / "ort", max_len=48, threads=1)


def close(got: NDArray[Any], wanted: NDArray[Any]) -> bool:
    return bool(np.abs(got - wanted).max() < 2e-3 * np.abs(wanted).max())


def prompt(length: int) -> list[int]:
    return [int(token) for token in RNG.integers(0, 2048, length)]


@pytest.mark.parametrize("writing", [PLUGIN, SELECT])
def test_prompts_in_pieces_and_decoding(model: Path, writing: str) -> None:
    """Prompts of one to three pieces, continued, and decoded from a CUDA graph (captured at the second step)."""
    ours, theirs = opened(model, writing), expected(model)
    for length in (1, 7, 8, 20):
        piece = prompt(length)
        assert close(ours.prefill([piece]), theirs.prefill([piece]))
        for token in prompt(2):
            step = np.array([token])
            assert close(ours.decode(step), theirs.decode(step))
            assert ours.lengths.tolist() == theirs.lengths.tolist()
    turns = 2 if writing == SELECT or any(v.name.startswith("past_conv") for v in ours._ports[0]) else 1
    assert ours.gpu.captures == turns and ours.captured
    assert ours.gpu.launches == 8 - turns


@pytest.mark.parametrize("writing", [PLUGIN, SELECT])
def test_ragged_batches(model: Path, writing: str) -> None:
    """Rows end in different pieces; what follows them is padding."""
    ours, theirs = opened(model, writing), expected(model)
    ours.reset(3)
    theirs.reset(3)
    for lengths in ((3, 19, 8), (14, 1, 7)):
        rows = [prompt(length) for length in lengths]
        ours.reset()
        theirs.reset()
        assert close(ours.prefill(rows), theirs.prefill(rows))
        for _ in range(4):
            step = np.array(prompt(3))
            assert close(ours.decode(step), theirs.decode(step))
        assert ours.lengths.tolist() == [length + 4 for length in lengths]
    with pytest.raises(ValueError, match="only a batch of one"):
        ours.prefill([prompt(1)] * 3)
    with pytest.raises(UserError, match=r"4 rows are more than the engine's 3.*--max-batch 4"):
        ours.reset(4)


def test_scores(model: Path) -> None:
    ids = RNG.integers(0, 2048, (2, 17))
    ours = opened(model)
    assert close(ours.score(ids), expected(model).score(ids))
    assert ours.batch_size == 2 and not ours.lengths.any()
    assert close(ours.score(ids[:1]), expected(model).score(ids[:1]))


def test_greedy_tokens_on_the_device(model: Path) -> None:
    """The same tokens as from logits on the host; the logits are not downloaded."""
    ours, host, theirs = opened(model), opened(model, device_argmax=False), expected(model)
    start = prompt(9)
    logits = [backend.prefill([start]) for backend in (ours, host, theirs)]
    token = logits[2].argmax(-1)
    ours._logits[:] = np.nan
    for _ in range(5):
        wanted = theirs.decode(token).argmax(-1)
        assert ours.decode_greedy(token).tolist() == wanted.tolist() == host.decode_greedy(token).tolist()
        token = wanted
    assert np.isnan(ours._logits).all() and ours._argmax.calls == 5
    step = np.array(prompt(1))  # and logits can be had in between, from a graph of their own
    assert close(ours.decode(step), theirs.decode(step))


def test_truncating(model: Path) -> None:
    ours, theirs = opened(model), expected(model)
    first, second = prompt(12), prompt(3)
    for backend in (ours, theirs):
        backend.prefill([first])
    assert ours.truncate(5) == theirs.truncate(5)
    assert close(ours.prefill([second]), theirs.prefill([second]))


def test_a_full_cache_is_said_and_changes_nothing(model: Path) -> None:
    ours, theirs = opened(model), expected(model)
    for backend in (ours, theirs):
        backend.prefill([[5] * 47])
    with pytest.raises(UserError, match="49 tokens do not fit a cache of 48"):
        ours.prefill([[1, 2]])
    step = np.array([3])
    assert close(ours.decode(step), theirs.decode(step))
    with pytest.raises(UserError, match="do not fit"):
        ours.decode(step)


@pytest.mark.parametrize("name", ["attention", "conv"])
def test_an_interrupted_prompt(name: str, tmp_path: Path) -> None:
    """A cache in place keeps what it had; states that took turns are emptied, never wrong."""
    ours, theirs = opened(exported(name, tmp_path)), expected(tmp_path / "onnx")
    start, later = prompt(4), prompt(16)
    ours.prefill([start])
    plain, calls = ours._gpu.download, []

    def stopped(array: NDArray[Any], address: int) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        plain(array, address)

    ours._gpu.download = stopped
    with pytest.raises(KeyboardInterrupt):
        ours.prefill([later])
    ours._gpu.download = plain
    assert ours.lengths.tolist() == ([4] if name == "attention" else [0])
    again = later if name == "attention" else start + later
    assert close(ours.prefill([again]), theirs.prefill([start + later]))


def test_a_step_that_cannot_be_captured_runs_plainly(tmp_path: Path) -> None:
    ours, theirs = opened(exported("attention", tmp_path)), expected(tmp_path / "onnx")
    ours.gpu.refuse_capture = True
    for token in prompt(4):
        step = np.array([token])
        assert close(ours.decode(step), theirs.decode(step))
    assert not ours.captured and not ours.gpu.launches
    assert "not permitted" in ours._replays[0, "logits"].refused


def test_adapters(tmp_path: Path) -> None:
    onnx = exported("lora", tmp_path)
    ours, theirs = opened(onnx), expected(onnx)
    shapes = {value.name: value.shape for value in read_onnx(onnx / "model.onnx").inputs}
    halves = {
        name: RNG.normal(size=[size if isinstance(size, int) else 3 for size in shape]).astype(np.float32)
        for name, shape in shapes.items() if name.startswith("lora_")
    }  # fmt: skip
    ids = prompt(10)
    plain = theirs.prefill([ids])
    theirs.set_adapter(Adapter(tmp_path, halves))
    ours.decode(np.array([1]))
    ours.set_adapter(Adapter(tmp_path, halves))
    wanted = theirs.prefill([ids])
    assert close(ours.prefill([ids]), wanted) and not close(plain, wanted)
    ours.reset(2)  # buffers are new, the adapter stays
    ours.reset(1)
    assert close(ours.prefill([ids]), wanted)
    ours.set_adapter(None)
    assert close(ours.prefill([ids]), plain)
    wide = {name: np.zeros([9 if size == 3 else size for size in half.shape], np.float32)
            for name, half in halves.items()}  # fmt: skip
    with pytest.raises(UserError, match=r"rank 9, the engine takes 6.*--lora-rank 9"):
        ours.set_adapter(Adapter(tmp_path, wide))


def test_memory_is_what_was_planned(model: Path) -> None:
    ours = opened(model, max_batch=1)
    assert ours.memory() == {"weights": 123, "kv_cache": ours.plan.memory.cache}
    twice = opened(model, SELECT, max_batch=1).memory()["kv_cache"]
    assert twice == 2 * expected(model).memory()["kv_cache"] or any(
        value.name.startswith("past_conv") for value in ours._ports[0]
    )


def test_it_is_a_backend(model: Path) -> None:
    backend: Backend = opened(model)
    assert backend.vocab_size == 2048 and backend.max_len == 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(names=["input_ids"]), "the engine and its graph differ in"),
        (dict(dtype=lambda name: "FP8"), "the engine has input_ids in FP8, its graph in I64"),
        (dict(is_on_device=lambda name: False), "wants input_ids on the host"),
    ],
)
def test_an_engine_of_another_graph(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    backend = opened(exported("attention", tmp_path))
    other = type("Other", (Engine,), {k: (property(lambda _, v=v: v) if k == "names" else staticmethod(v))
                                      for k, v in change.items()})  # fmt: skip
    engine = other(tmp_path / "onnx", read_onnx(tmp_path / "onnx/model.onnx"), backend.plan, backend.gpu)
    with pytest.raises(ArtifactError, match=message):
        TensorRTBackend(engine, backend.gpu, backend._ports, backend._sizes, PLUGIN, max_len=48)


def test_ports_survive_the_artifact(model: Path, tmp_path: Path) -> None:
    graph = read_onnx(model / "model.onnx")
    (tmp_path / "bindings.json").write_text(bindings_json(graph))
    assert read_ports(tmp_path) == (graph.inputs, graph.outputs)
    (tmp_path / "bindings.json").write_text(json.dumps({"inputs": []}))
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_ports(tmp_path)


def test_without_tensorrt_an_engine_says_what_is_missing(tmp_path: Path) -> None:
    if plan_has_tensorrt():
        pytest.skip("TensorRT is installed here")
    home = tmp_path / "home"
    export_dir = exported("attention", home)
    with write_artifact(tmp_path / "engine", "engine", inputs={}, settings={"max_len": 32}) as artifact:
        for file in export_dir.glob("*token*"):
            (artifact.directory / file.name).write_bytes(file.read_bytes())
        (artifact.directory / "config.json").write_bytes((export_dir / "config.json").read_bytes())
    with pytest.raises(UserError, match="TensorRT's Python package is not installed.*python3-libnvinfer"):
        open_runtime(tmp_path / "engine")


def plan_has_tensorrt() -> bool:
    from orin_kit.engine.build import installed_tensorrt

    return installed_tensorrt() is not None


def test_options_reach_the_plan(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen3", num_hidden_layers=1)
    export(tmp_path / "hf", tmp_path / "onnx", precision="fp16", dialect="trt_plugin", max_len=128, progress=False)
    _, plan = plan_engine(tmp_path / "onnx", Options(max_batch=2, prefill=32, logits=4), tensorrt="10.3")
    assert plan.profiles[0]["input_ids"] == ((1, 1), (2, 32), (2, 32))
    assert plan.profiles[1]["input_ids"] == ((1, 1), (2, 1), (2, 1))
