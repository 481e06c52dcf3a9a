"""`orin-kit build-engine`: an ONNX artifact to a TensorRT engine, on the machine that will run it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from orin_kit.engine import trt
from orin_kit.engine.cache_tensors import cache_layers
from orin_kit.engine.compatibility import NETWORK, Machine, cache_writing, check_engine
from orin_kit.engine.cuda import Cuda
from orin_kit.engine.plan import Memory, Plan, Sizes, make_plan
from orin_kit.engine.plugin_library import PluginLibrary, find_library, library_record
from orin_kit.errors import ArtifactError, UserError
from orin_kit.inspect.onnx_file import OnnxFile, read_onnx
from orin_kit.manifest import ONNX_MODEL, Manifest, check_free, read_manifest, write_artifact
from orin_kit.models.spec import read_spec
from orin_kit.tokenizer import copy_tokenizer

ENGINE_PLAN, ENGINE_BINDINGS = "engine.plan", "bindings.json"
DEFAULT_TENSORRT = "10.3"  # what a plan is made for where none is installed
MB = 1_000_000
# Of the graph's manifest, what an engine's says too.
INHERITED = (
    "precision",
    "activations",
    "dialect",
    "embedding_bits",
    "kv_bits",
    "kv_update",
    "tied_table",
    "lora_targets",
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """How an engine is built.

    Attributes:
        kv: "plugin" (our kernels) or "native" (TensorRT's own layers).
        max_batch, max_len, prefill, opt_prefill, logits, lora_rank: see `plan.Sizes`; None takes what the graph allows
            (`max_len`), or 512 and 128 or less (`prefill`, `opt_prefill`).
        workspace_mb: the most that a layer may use for intermediate results; TensorRT's own limit when None.
        level: TensorRT's optimization level, 0 (fastest build) to 5.
        timing_cache: file of measured kernels, read and written; one for each TensorRT and GPU in the user's cache
            directory when None.
        refit: build an engine that can take other weights later.
        weight_streaming: let the runtime keep weights out of GPU memory; slower, and without a CUDA graph.
    """

    kv: str = "plugin"
    max_batch: int = 1
    max_len: int | None = None
    prefill: int | None = None
    opt_prefill: int | None = None
    logits: int = 16
    lora_rank: int = 0
    workspace_mb: int | None = None
    level: int = 3
    timing_cache: Path | None = None
    refit: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise UserError(f"the optimization level is {self.level}", mend="give 0 to 5")
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise UserError(f"the workspace is {self.workspace_mb} MB", mend="give 1 or more")


@dataclass(frozen=True)
class Source:
    """An ONNX artifact, read."""

    directory: Path
    manifest: Manifest
    graph: OnnxFile


def plan_engine(onnx: str | Path, options: Options, *, tensorrt: str | None = None) -> tuple[Source, Plan]:
    """What `build_engine` would build; needs neither TensorRT nor a GPU.

    Args:
        onnx: an ONNX artifact.
        options: as for `build_engine`.
        tensorrt: version to plan for; the one installed, or `DEFAULT_TENSORRT`.

    Raises:
        ArtifactError: no whole ONNX artifact.
        UserError: options that do not fit it or the version.
    """
    directory = Path(onnx)
    manifest = read_manifest(directory, "onnx")
    settings = manifest.settings
    version = tensorrt or installed_tensorrt() or DEFAULT_TENSORRT
    writing = cache_writing(
        options.kv, settings.get("dialect", "ort"), settings.get("kv_update", "select"),
        int(settings.get("kv_bits", 16)), version, directory,
    )  # fmt: skip
    limit = int(settings["max_len"])
    max_len = options.max_len or limit
    if max_len > limit:
        what = f"--max-len {max_len} is longer than {limit}, the longest context of {directory}"
        raise UserError(what, mend=f"lower it, or export again with --max-len {max_len}")
    prefill = options.prefill or min(512, max_len)
    sizes = Sizes(
        max_batch=options.max_batch,
        max_len=max_len,
        prefill=prefill,
        opt_prefill=options.opt_prefill or min(128, prefill),
        logits=min(options.logits, prefill),
        lora_rank=options.lora_rank,
    )
    graph = read_onnx(directory / ONNX_MODEL)
    workspace = None if options.workspace_mb is None else options.workspace_mb * MB
    plan = make_plan(graph, read_spec(directory), sizes, writing, workspace=workspace)
    return Source(directory, manifest, graph), plan


def build_engine(
    onnx: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    plugins: Path | None = None,
    refit_from: Path | None = None,
    check_memory: bool = True,
    overwrite: bool = False,
    show: bool = True,
) -> dict[str, Any]:
    """Build an engine, or put the graph's weights into one that was built with `refit`.

    Args:
        onnx: an ONNX artifact of a trt dialect.
        out: the artifact to write (kind `engine`): the plan, the plugin library, tokenizer and config.
        options: see there.
        plugins: the plugin library; found by `find_library` when None.
        refit_from: an engine artifact of the same architecture, built with `refit`; takes seconds instead of minutes.
        check_memory: refuse when the estimate does not fit.
        overwrite: replace an existing artifact.
        show: show progress.

    Returns:
        What the manifest's `results` say.

    Raises:
        UserError: TensorRT, pycuda, GPU, plugin library or memory are missing or do not fit; said before the build.
        ArtifactError: the graph is not whole, or TensorRT does not read it.
    """
    options = options or Options()
    check_free(out, overwrite=overwrite)
    if refit_from is not None:
        options = _options_of(refit_from, options)
    source, plan = plan_engine(onnx, options, tensorrt=trt.version())
    cuda = Cuda()
    machine = Machine(trt.version(), cuda.sm, cuda.name)
    library = _library(plan, plugins, machine)
    if check_memory:
        _check_memory(plan.memory, cuda)
    if refit_from is not None:
        check_engine(refit_from, read_manifest(refit_from, "engine").settings, machine)
    session = trt.Session()
    session.register(library.path if library else None, plan.creators)
    settings = _settings(source, plan, options, machine, library)
    inputs = {"model": source.directory, **({"engine": refit_from} if refit_from else {})}
    with write_artifact(out, "engine", inputs=inputs, settings=settings, overwrite=overwrite) as artifact:
        started = time.perf_counter()
        if refit_from is None:
            _build(session, source, plan, options, machine, artifact.directory / ENGINE_PLAN, show)
        else:
            refitted = session.refit(session.open(refit_from / ENGINE_PLAN), source.directory / ONNX_MODEL)
            (artifact.directory / ENGINE_PLAN).write_bytes(refitted)
        seconds = time.perf_counter() - started
        _copy(source, library, artifact.directory)
        artifact.results |= {
            "parameters": source.manifest.results.get("parameters"),
            "model_bytes": (artifact.directory / ENGINE_PLAN).stat().st_size,
            "build_seconds": round(seconds, 1),
            "warnings": session.messages.warnings,
        }
    return artifact.results


def installed_tensorrt() -> str | None:
    """The version that is installed and loads; None without."""
    try:
        return trt.version()
    except UserError:
        return None


def bindings_json(graph: OnnxFile) -> str:
    """The graph's inputs and outputs, as an engine artifact keeps them for the runtime."""
    ports = {"inputs": graph.inputs, "outputs": graph.outputs}
    return json.dumps({name: [asdict(value) for value in values] for name, values in ports.items()}, indent=1)


def _build(
    session: trt.Session, source: Source, plan: Plan, options: Options, machine: Machine, out: Path, show: bool
) -> None:
    cache = options.timing_cache or _timing_cache(machine)
    onnx = source.directory / ONNX_MODEL
    request = trt.Request(
        onnx=onnx,
        profiles=plan.profiles,
        workspace=plan.memory.workspace or None,
        level=options.level,
        timing_cache=cache.read_bytes() if cache.is_file() else b"",
        refit=options.refit,
        weight_streaming=options.weight_streaming,
        caches=cache_layers(onnx) if plan.cache_writing == NETWORK else (),
    )
    with BuildProgress(show=show) as progress:
        engine, timings = _in_a_thread(lambda: session.build(request, progress), progress.stop)
    out.write_bytes(engine)
    _replace(cache, timings)


def _in_a_thread(work: Callable[[], Result], stop: Callable[[], None]) -> Result:
    """Do it in a thread, so that Ctrl-C is heard while TensorRT works; `stop` makes it end soon."""
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tensorrt-build")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except BaseException:
        stop()
        thread.join()
        raise
    if failed:
        raise failed[0]
    return done[0]


class BuildProgress:
    """TensorRT's phases as bars on stderr; see `trt.Progress`. Thread-safe."""

    def __init__(self, *, show: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
        self._tasks: dict[str, TaskID] = {}
        self._depth: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def __enter__(self) -> BuildProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stop(self) -> None:
        """Let the build end at its next step."""
        self._stopped.set()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            depth = self._depth.get(parent or "", -1) + 1
            self._depth[phase] = depth
            self._tasks[phase] = self._bars.add_task("  " * depth + phase, total=steps)

    def step(self, phase: str, step: int) -> bool:
        with self._lock:
            if phase in self._tasks:
                self._bars.update(self._tasks[phase], completed=step + 1)
        return not self._stopped.is_set()

    def finish(self, phase: str) -> None:
        with self._lock:
            if phase in self._tasks:
                self._bars.remove_task(self._tasks.pop(phase))
                del self._depth[phase]


def _library(plan: Plan, given: Path | None, machine: Machine) -> PluginLibrary | None:
    """The plugin library, checked. A native engine takes it where it is there, for the argmax on the device."""
    path = find_library(given)
    if path is None:
        if plan.creators:
            needed = ", ".join(creator.name for creator in plan.creators)
            mend = "build jetson/plugins and give the library with --plugins, or export with --dialect trt_native"
            raise UserError(f"the graph needs the plugins {needed}, and there is no plugin library", mend=mend)
        return None
    library = PluginLibrary(path)
    library.check_sm(machine.sm)
    return library


def _check_memory(memory: Memory, cuda: Cuda) -> None:
    """An Orin's GPU has the host's memory; what a driver calls free there leaves out what the page cache would give."""
    available = int(psutil.virtual_memory().available)
    if cuda.integrated:
        needs = [("memory", memory.build, available)]
    else:
        needs = [
            ("GPU memory", memory.run + memory.workspace, cuda.free_bytes()),
            ("memory", memory.build - memory.run, available),
        ]
    for kind, needed, there in needs:
        if needed > there:
            what = f"the build takes about {needed / 1e9:.1f} GB of {kind}, {there / 1e9:.1f} GB are available"
            mend = "close other programs, add swap, lower --prefill or --workspace, or use --no-memory-check"
            raise UserError(what, mend=mend)


def _settings(
    source: Source, plan: Plan, options: Options, machine: Machine, library: PluginLibrary | None
) -> dict[str, Any]:
    from_graph = {name: source.manifest.settings[name] for name in INHERITED if name in source.manifest.settings}
    return {
        **from_graph,
        **asdict(plan.sizes),
        "kv": options.kv,
        "cache_writing": plan.cache_writing,
        "level": options.level,
        "workspace_mb": options.workspace_mb,
        "refit": options.refit,
        "weight_streaming": options.weight_streaming,
        "tensorrt": machine.tensorrt,
        "sm": machine.sm,
        "gpu": machine.gpu,
        "plugins": [asdict(creator) for creator in plan.creators],
        "plugin_library": library_record(library.path) if library else None,
    }


def _options_of(engine: Path, given: Options) -> Options:
    """The options that an engine to be refitted was built with."""
    settings = read_manifest(engine, "engine").settings
    if not settings["refit"]:
        raise UserError(f"{engine} was not built with --refit", mend="build it with --refit once")
    names = ("kv", "max_batch", "max_len", "prefill", "opt_prefill", "logits", "lora_rank", "workspace_mb", "level",
             "refit", "weight_streaming")  # fmt: skip
    return Options(**{name: settings[name] for name in names}, timing_cache=given.timing_cache)


def _copy(source: Source, library: PluginLibrary | None, out: Path) -> None:
    """What the runtime needs beside the plan."""
    (out / ENGINE_BINDINGS).write_text(bindings_json(source.graph), "utf-8")
    if not (source.directory / "config.json").is_file():
        raise ArtifactError(f"{source.directory} lacks config.json", mend="export it again")
    shutil.copyfile(source.directory / "config.json", out / "config.json")
    copy_tokenizer(source.directory, out)
    if library is not None:
        shutil.copyfile(library.path, out / library.path.name)


def _timing_cache(machine: Machine) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "orin-kit" / f"timing-{machine.tensorrt}-sm_{machine.sm}.cache"


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        stream.write(data)
    Path(stream.name).replace(path)
