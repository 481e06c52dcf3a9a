"""Every call of pycuda and of the CUDA driver that orin-kit makes: one thin module.

pycuda gives memory, streams and copies (https://documen.tician.de/pycuda/driver.html, `tools/pycuda_api.json` lists
what is used). It has no CUDA graphs, so those are asked of the driver itself, `libcuda.so.1`, by ctypes
(https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GRAPH.html). The context is the device's primary one, which
TensorRT and the plugins use as well.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from orin_kit.errors import OrinKitError, UserError

# pycuda's classes, for the comparison with `tools/pycuda_api.json`.
Device: TypeAlias = Any
Context: TypeAlias = Any
Stream: TypeAlias = Any

CAPTURE_THREAD_LOCAL = 1  # CUstreamCaptureMode: other threads may do what they like meanwhile
Pointer = ctypes.c_void_p
# The driver's functions: arguments; all return a CUresult.
DRIVER: dict[str, tuple[Any, ...]] = {
    "cuStreamBeginCapture_v2": (Pointer, ctypes.c_int),
    "cuStreamEndCapture": (Pointer, ctypes.POINTER(Pointer)),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(Pointer), Pointer, ctypes.c_ulonglong),
    "cuGraphLaunch": (Pointer, Pointer),
    "cuGraphExecDestroy": (Pointer,),
    "cuGraphDestroy": (Pointer,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


class Launchable(Protocol):
    """Work that was captured and can be put on the stream again."""

    def launch(self) -> None: ...


class Gpu(Protocol):
    """What the TensorRT backend asks of a GPU; `Cuda` is the real one. Work runs in the order it was given."""

    stream: int  # a CUstream

    def allocate(self, size: int) -> Any:
        """Zeroed memory that lives as long as the object; `int(object)` is its address, aligned to 256."""
        ...

    def pinned(self, count: int, dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked array `[count]` that copies can run from and to."""
        ...

    def zero(self, address: int, size: int) -> None: ...

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """From a contiguous part of a pinned array, which must not change before `wait`."""
        ...

    def download(self, array: NDArray[Any], address: int) -> None: ...

    def wait(self) -> None:
        """Until everything given so far is done."""
        ...

    def capture(self, work: Callable[[], None]) -> Launchable:
        """Record what `work` gives to the stream, without doing it.

        Raises:
            OrinKitError: the work cannot be captured; the stream is usable again.
        """
        ...


class Cuda:
    """The first GPU, its primary context current in this thread, and one stream. See `Gpu`.

    Raises:
        UserError: pycuda is not installed, or there is no GPU.
    """

    def __init__(self) -> None:
        self._cuda = cuda = _load()
        try:
            cuda.init()
            self._device: Device = cuda.Device(0)
            self._context: Context = self._device.retain_primary_context()
            self._context.push()
            atexit.register(self._leave)
        except cuda.Error as error:
            raise UserError(f"CUDA does not start: {error}", mend="run orin-kit doctor") from error
        self._stream: Stream = cuda.Stream()
        self.stream = int(self._stream.handle)
        self._driver = _driver()

    @property
    def name(self) -> str:
        return str(self._device.name())

    @property
    def sm(self) -> int:
        """Compute capability without its dot: 87."""
        major, minor = self._device.compute_capability()
        return 10 * int(major) + int(minor)

    @property
    def integrated(self) -> bool:
        """Whether the GPU has the host's memory, as an Orin's does."""
        return bool(self._device.get_attribute(self._cuda.device_attribute.INTEGRATED))

    def free_bytes(self) -> int:
        free, _total = self._cuda.mem_get_info()
        return int(free)

    def allocate(self, size: int) -> Any:
        try:
            memory = self._cuda.mem_alloc(max(size, 1))
        except self._cuda.MemoryError as error:
            what = f"no {size / 1e6:.0f} MB of GPU memory ({self.free_bytes() / 1e6:.0f} MB are free)"
            raise UserError(what, mend="close other programs, or build with less --max-len or --max-batch") from error
        self.zero(int(memory), size)
        return memory

    def pinned(self, count: int, dtype: DTypeLike) -> NDArray[Any]:
        array: NDArray[Any] = self._cuda.pagelocked_zeros(count, np.dtype(dtype))
        return array

    def zero(self, address: int, size: int) -> None:
        if size:
            self._cuda.memset_d8_async(address, 0, size, self._stream)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self._cuda.memcpy_htod_async(address, array, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        self._cuda.memcpy_dtoh_async(array, address, self._stream)

    def wait(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Launchable:
        self._call("cuStreamBeginCapture_v2", self.stream, CAPTURE_THREAD_LOCAL)
        graph = Pointer()
        try:
            work()
        except BaseException:
            self._driver.cuStreamEndCapture(self.stream, ctypes.byref(graph))
            if graph:
                self._driver.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        executable = Pointer()
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            self._driver.cuGraphDestroy(graph)
        return _Graph(self, executable)

    def _leave(self) -> None:
        """pycuda aborts a process that ends with a context pushed."""
        self._context.pop()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            said = text.value.decode() if text.value else f"error {status}"
            raise OrinKitError(f"{name}: {said}", mend="run orin-kit doctor, then report it")


class _Graph:
    def __init__(self, owner: Cuda, executable: ctypes.c_void_p) -> None:
        self._owner, self._executable = owner, executable

    def launch(self) -> None:
        self._owner._call("cuGraphLaunch", self._executable, self._owner.stream)

    def __del__(self) -> None:
        self._owner._driver.cuGraphExecDestroy(self._executable)


def _load() -> Any:
    try:
        return import_module("pycuda.driver")
    except ModuleNotFoundError as error:
        mend = "pip install pycuda (it is built against the CUDA of JetPack; docs/engines.md)"
        raise UserError("pycuda is not installed", mend=mend) from error
    except (ImportError, OSError) as error:
        raise UserError(f"pycuda does not load: {error}", mend="install it again for this CUDA") from error


def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in DRIVER.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library
