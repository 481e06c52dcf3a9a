"""An engine artifact opened on this machine: what must fit is compared before TensorRT sees it."""

from __future__ import annotations

import json
from pathlib import Path

from orin_kit.engine.build import ENGINE_BINDINGS, ENGINE_PLAN
from orin_kit.engine.compatibility import Machine, check_engine
from orin_kit.engine.cuda import Cuda
from orin_kit.engine.plan import Sizes
from orin_kit.engine.plugin_library import PluginLibrary, claim
from orin_kit.engine.trt import Creator, Session, version
from orin_kit.errors import ArtifactError
from orin_kit.inspect.onnx_file import Value
from orin_kit.manifest import Manifest
from orin_kit.runtime.backends.tensorrt import Ports, TensorRTBackend


def open_engine(directory: Path, manifest: Manifest, *, max_len: int, batch_size: int) -> TensorRTBackend:
    """Open an engine artifact on this machine's GPU.

    Raises:
        UserError: TensorRT or pycuda is missing, or there is no GPU or memory for it.
        ArtifactError: it was built for another GPU, TensorRT or plugin library (see `check_engine`).
    """
    settings = manifest.settings
    tensorrt, cuda = version(), Cuda()
    check_engine(directory, settings, Machine(tensorrt, cuda.sm, cuda.name))
    library, record = None, settings["plugin_library"]
    if record:
        claim(record["sha256"], directory)
        library = PluginLibrary(directory / record["name"])
        library.check_sm(cuda.sm)
    session = Session()
    session.register(library.path if library else None, [Creator(**one) for one in settings["plugins"]])
    engine = session.open(directory / ENGINE_PLAN)
    streams = bool(settings["weight_streaming"])
    if streams:
        engine.stream_weights(None)
    sizes = Sizes(**{name: int(settings[name]) for name in Sizes.__dataclass_fields__})
    kernels = "our plugins" if settings["kv"] == "plugin" else "native layers"
    return TensorRTBackend(
        engine,
        cuda,
        read_ports(directory),
        sizes,
        settings["cache_writing"],
        max_len=max_len,
        batch_size=batch_size,
        argmax=library,
        weights_bytes=(directory / ENGINE_PLAN).stat().st_size,
        name=f"TensorRT {tensorrt} on {cuda.name}, {kernels}{', weights streamed' if streams else ''}",
        capture=not streams,
    )


def read_ports(directory: Path) -> Ports:
    """The inputs and outputs of an engine artifact's graph.

    Raises:
        ArtifactError: they cannot be read.
    """
    path = directory / ENGINE_BINDINGS
    try:
        said = json.loads(path.read_text("utf-8"))
        inputs, outputs = (
            tuple(Value(one["name"], one["dtype"], tuple(one["shape"])) for one in said[side])
            for side in ("inputs", "outputs")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", mend="build the engine again") from error
    return inputs, outputs
