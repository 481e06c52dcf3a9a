"""Every call of TensorRT that orin-kit makes, and nothing else: one thin module.

`tools/tensorrt_api.json` lists the classes, methods and arguments used here; a test compares this file with that table,
and `tools/check_tensorrt_api.py` the table with the bindings of TensorRT 10.3, 10.16 and 11. For the comparison every
variable that holds one of TensorRT's objects gets it from TensorRT in this file, or is annotated with its class.
TensorRT comes with JetPack and is no dependency: without it this module imports, and `load` says what is missing.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from orin_kit.errors import ArtifactError, OrinKitError, UserError

IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
IHostMemory: TypeAlias = Any
ILogger: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
ITensor: TypeAlias = Any
Builder: TypeAlias = Any
OnnxParser: TypeAlias = Any

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # least, optimal, greatest
KEPT_MESSAGES = 20
# Levels of ILogger.Severity: INTERNAL_ERROR 0, ERROR 1, WARNING 2, INFO 3, VERBOSE 4.
ERROR = 1


class Progress(Protocol):
    """Who is told how far a build is; called from any thread."""

    def start(self, phase: str, parent: str | None, steps: int) -> None: ...

    def step(self, phase: str, step: int) -> bool:
        """False stops the build."""
        ...

    def finish(self, phase: str) -> None: ...


@dataclass(frozen=True)
class Creator:
    """A plugin that a graph's nodes need."""

    name: str
    version: str
    namespace: str


@dataclass(frozen=True)
class CacheLayer:
    """A cache that TensorRT's own layer shall write: tensors of the network by their names."""

    past: str  # the cache, an input
    update: str  # what is written into it
    present: str  # the written cache, an output


@dataclass(frozen=True)
class Request:
    """What `build` shall build.

    Attributes:
        onnx: the graph, its weights beside it.
        profiles: for each its input shapes by name, as least, optimal and greatest.
        workspace: bytes that a layer may use for intermediate results; TensorRT's own limit when None.
        level: optimization level, 0 to 5.
        timing_cache: what an earlier build wrote, or b"".
        refit, weight_streaming: builder flags.
        caches: caches to be written by KVCacheUpdate layers instead of the graph's own operators (TensorRT >= 10.15).
        lengths: the input that says where the caches are written; for `caches`.
    """

    onnx: Path
    profiles: Sequence[Mapping[str, Range]]
    workspace: int | None = None
    level: int = 3
    timing_cache: bytes = b""
    refit: bool = False
    weight_streaming: bool = False
    caches: Sequence[CacheLayer] = ()
    lengths: str = "past_lengths"


@dataclass
class Messages:
    """What TensorRT said, the latest `KEPT_MESSAGES` errors and warnings."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, severity: int, text: str) -> None:
        kept = self.errors if severity <= ERROR else self.warnings
        kept.append(" ".join(text.split()))
        del kept[:-KEPT_MESSAGES]

    def why(self) -> str:
        """The first error: later ones are mostly its consequences."""
        return self.errors[0] if self.errors else "TensorRT gave no reason"


def load() -> Any:
    """The module `tensorrt`.

    Raises:
        UserError: it is not installed, or its libraries are not found.
    """
    try:
        return import_module("tensorrt")
    except ModuleNotFoundError as error:
        mend = "on a Jetson: sudo apt install python3-libnvinfer, and a virtual environment that sees system packages"
        raise UserError("TensorRT's Python package is not installed", mend=mend) from error
    except (ImportError, OSError) as error:
        raise UserError(
            f"TensorRT does not load: {error}", mend="install the libnvinfer of the same version"
        ) from error


def version() -> str:
    """Of the TensorRT that is installed, "10.3.0"."""
    trt = load()
    return str(trt.__version__)


class Session:
    """TensorRT with a log of its own, which must outlive all that is made here."""

    def __init__(self) -> None:
        self.messages = Messages()
        self._trt = trt = load()
        messages = self.messages

        class Log(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if int(severity) <= int(trt.ILogger.WARNING):
                    messages.add(int(severity), msg)

        self._log: ILogger = Log()

    def register(self, library: Path | None, creators: Sequence[Creator]) -> None:
        """Load the plugin library unless its creators are known already.

        Raises:
            UserError: creators are missing afterwards.
        """
        missing = self._missing(creators)
        if missing and library is not None:
            trt = self._trt
            registry = trt.get_plugin_registry()
            registry.load_library(str(library))
            missing = self._missing(creators)
        if missing:
            names = ", ".join(f"{c.namespace}::{c.name} version {c.version}" for c in missing)
            where = f"{library} does not register" if library else "no plugin library registers"
            why = f" ({self.messages.why()})" if self.messages.errors else ""
            raise UserError(f"{where} {names}{why}", mend="build jetson/plugins for this TensorRT, and give --plugins")

    def build(self, request: Request, progress: Progress) -> tuple[IHostMemory, bytes]:
        """Parse and build: the serialized engine (bytes-like), and the timing cache for the next build.

        Raises:
            ArtifactError: the parser refuses the graph; operator and node are named.
            OrinKitError: no engine came out, or the build was stopped.
        """
        trt = self._trt
        builder = trt.Builder(self._log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(request.onnx)):
            raise ArtifactError(
                f"TensorRT cannot read {request.onnx}: {_parse_error(parser)}", mend=_parse_mend(parser)
            )
        if request.caches:
            self._write_caches(network, request)
        config = builder.create_builder_config()
        monitor = self._monitor(progress)
        config.progress_monitor = monitor
        self._configure(config, request)
        self._add_profiles(builder, config, request)
        cache = config.create_timing_cache(request.timing_cache)
        # One of another device or TensorRT is refused: begin anew.
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise OrinKitError(f"TensorRT built no engine from {request.onnx}: {self.messages.why()}", mend=BUILD_MEND)
        return plan, bytes(cache.serialize())

    def open(self, plan: Path) -> Engine:
        """Deserialize an engine; its plugins must be registered.

        Raises:
            ArtifactError: TensorRT refuses it.
        """
        trt = self._trt
        runtime = trt.Runtime(self._log)
        with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            engine = runtime.deserialize_cuda_engine(view)
        if engine is None:
            raise ArtifactError(
                f"TensorRT does not open {plan}: {self.messages.why()}", mend="build it on this machine"
            )
        return Engine(trt, engine, self)

    def refit(self, engine: Engine, onnx: Path) -> IHostMemory:
        """Put another checkpoint's weights, of the same shapes, into an engine; serialized.

        Raises:
            UserError: the engine was not built for it, or the graph is another.
        """
        trt = self._trt
        if not engine.refittable:
            raise UserError("the engine cannot take other weights", mend="build it with --refit first")
        refitter = trt.Refitter(engine.raw, self._log)
        parser = trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
            what = f"{onnx} does not fit the engine: {self.messages.why()}"
            raise UserError(what, mend="refit with a model of the same architecture and export options")
        return engine.serialized()

    def _missing(self, creators: Sequence[Creator]) -> list[Creator]:
        trt = self._trt
        registry = trt.get_plugin_registry()
        return [c for c in creators if registry.get_creator(c.name, c.version, c.namespace) is None]

    def _configure(self, config: IBuilderConfig, request: Request) -> None:
        trt = self._trt
        config.builder_optimization_level = request.level
        config.max_aux_streams = 0  # a decoder is a chain: nothing runs beside it, and streams would cost memory
        # Without it a plugin's caches would be copied (IPluginV3OneBuildV2::getAliasedInput).
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        if request.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
        if request.refit:
            config.set_flag(trt.BuilderFlag.REFIT)
        if request.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)

    def _add_profiles(self, builder: Builder, config: IBuilderConfig, request: Request) -> None:
        trt = self._trt
        for index, shapes in enumerate(request.profiles):
            profile = builder.create_optimization_profile()
            for name, (least, optimal, greatest) in shapes.items():
                profile.set_shape(name, trt.Dims(least), trt.Dims(optimal), trt.Dims(greatest))
            if config.add_optimization_profile(profile) != index:
                raise OrinKitError(f"TensorRT refuses profile {index}: {self.messages.why()}", mend=BUILD_MEND)

    def _write_caches(self, network: INetworkDefinition, request: Request) -> None:
        """Let KVCacheUpdate layers write the caches in place of the operators that the graph has for it."""
        trt = self._trt
        wanted = {name for cache in request.caches for name in (cache.update, cache.present)}
        tensors: dict[str, ITensor] = {}
        for index in range(network.num_inputs):
            given = network.get_input(index)
            tensors[given.name] = given
        before = network.num_layers
        for index in range(before):
            layer = network.get_layer(index)
            for place in range(layer.num_outputs):
                made = layer.get_output(place)
                if made.name in wanted:
                    tensors[made.name] = made
        missing = (wanted | {cache.past for cache in request.caches} | {request.lengths}) - set(tensors)
        if missing:
            raise ArtifactError(f"the parsed network has no tensor {min(missing)}", mend="export it again")
        lengths: ITensor = tensors[request.lengths]
        cast = network.add_cast(lengths, trt.int32)
        for cache in request.caches:
            past: ITensor = tensors[cache.past]
            update: ITensor = tensors[cache.update]
            old: ITensor = tensors[cache.present]
            written = network.add_kv_cache_update(past, update, cast.get_output(0), trt.KVCacheMode.LINEAR)
            new = written.get_output(0)
            for index in range(before):
                layer = network.get_layer(index)
                for place in range(layer.num_inputs):
                    read = layer.get_input(place)
                    if read is not None and read.name == cache.present:
                        layer.set_input(place, new)
            network.unmark_output(old)
            old.name = f"{cache.present}.unused"
            new.name = cache.present
            network.mark_output(new)

    def _monitor(self, progress: Progress) -> Any:
        trt = self._trt

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                progress.start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return progress.step(phase_name, step)

            def phase_finish(self, phase_name: str) -> None:
                progress.finish(phase_name)

        return Monitor()


class Engine:
    """A deserialized engine.

    Attributes:
        raw: TensorRT's object.
    """

    def __init__(self, trt: Any, engine: ICudaEngine, session: Session) -> None:
        self._trt, self._session = trt, session  # the session keeps the log alive
        self.raw: ICudaEngine = engine

    @property
    def names(self) -> list[str]:
        """Of its inputs and outputs."""
        return [self.raw.get_tensor_name(index) for index in range(self.raw.num_io_tensors)]

    @property
    def refittable(self) -> bool:
        return bool(self.raw.refittable)

    @property
    def layers(self) -> int:
        """After fusion."""
        return int(self.raw.num_layers)

    def dtype(self, name: str) -> str:
        """TensorRT's name of it: "HALF", "FLOAT", "INT64", ..."""
        return str(self.raw.get_tensor_dtype(name).name)

    def is_on_device(self, name: str) -> bool:
        return bool(self.raw.get_tensor_location(name) == self._trt.TensorLocation.DEVICE)

    def shape(self, name: str) -> Shape:
        """-1 where a dimension is a profile's."""
        return tuple(self.raw.get_tensor_shape(name))

    def context_bytes(self, profile: int) -> int:
        """Of device memory that a context of the profile works in."""
        return int(self.raw.get_device_memory_size_for_profile_v2(profile))

    def stream_weights(self, budget: int | None) -> int:
        """Keep at most `budget` bytes of the weights on the device, TensorRT's own choice when None; what it is now."""
        if budget is None:
            budget = self.raw.get_weight_streaming_automatic_budget()
        self.raw.weight_streaming_budget_v2 = budget
        return int(self.raw.weight_streaming_budget_v2)

    def serialized(self) -> IHostMemory:
        return self.raw.serialize()

    def context(self, profile: int, memory: int, size: int, stream: int) -> Context:
        """A context on one profile that works in `size` bytes at the device address `memory`, aligned to 256.

        Contexts may share the memory as long as they run one after the other.
        """
        trt = self._trt
        context = self.raw.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise OrinKitError(f"TensorRT made no context: {self._session.messages.why()}", mend="free memory")
        context.set_device_memory(memory, size)
        if not context.set_optimization_profile_async(profile, stream):
            raise OrinKitError(f"TensorRT refuses profile {profile}: {self._session.messages.why()}", mend=OPEN_MEND)
        return Context(context, self._session.messages)


class Context:
    """An engine's state of execution for one profile."""

    def __init__(self, context: IExecutionContext, messages: Messages) -> None:
        self._context: IExecutionContext = context
        self._messages = messages

    def set_shape(self, name: str, shape: Shape) -> None:
        """Raises OrinKitError when it lies outside the profile."""
        if not self._context.set_input_shape(name, shape):
            raise OrinKitError(f"{name} cannot be {list(shape)}: {self._messages.why()}", mend=OPEN_MEND)

    def set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise OrinKitError(f"{name} cannot lie at {address:#x}: {self._messages.why()}", mend=OPEN_MEND)

    def check(self) -> None:
        """Raises OrinKitError when an input has no shape or address yet."""
        missing = self._context.infer_shapes()
        if missing:
            raise OrinKitError(f"the engine's input {missing[0]} is not set", mend=OPEN_MEND)

    def enqueue(self, stream: int) -> None:
        """Put one step on a stream, which may be capturing."""
        if not self._context.execute_async_v3(stream):
            raise OrinKitError(f"TensorRT did not run: {self._messages.why()}", mend=OPEN_MEND)


BUILD_MEND = "give less --workspace or --prefill if memory ran out, else report it with the messages above"
OPEN_MEND = "build the engine again with this orin-kit"


def _parse_error(parser: OnnxParser) -> str:
    if not parser.num_errors:
        return "its parser gave no reason"
    error = parser.get_error(0)
    return f"{error.node_operator()} node {error.node_name() or error.node()}: {' '.join(error.desc().split())}"


def _parse_mend(parser: OnnxParser) -> str:
    operator = parser.get_error(0).node_operator() if parser.num_errors else ""
    if operator == "TRT_KVCacheUpdate":
        return "export with --kv-update select: parsers know this operator since TensorRT 11.0"
    return "export again with --dialect trt_plugin or trt_native"
