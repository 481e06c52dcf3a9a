"""The CUDA kernels of `jetson/plugins` called from tests: built for this CPU by the emulator, or as built for a GPU.

Buffers lie between guard bytes and are NaN before a kernel writes them; inputs are compared after each call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int32, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

PLUGINS = Path(__file__).parent.parent / "jetson" / "plugins"
GPU_LIBRARY = Path(os.environ.get("ORIN_KERNELS", PLUGINS / "build" / "liborin_kernels.so"))
GUARD = 256  # bytes on each side of a buffer; also its alignment
FLAGS = (
    "-std=c++17 -march=native -ffp-contract=off -fno-strict-aliasing -fPIC -fvisibility=hidden -Wall -Wextra "
    "-Wno-unknown-pragmas -DORIN_EMULATE"
).split()


SUFFIXES = {".cu", ".cpp"}


class BuildError(RuntimeError):
    """The emulator could not be built; says what the compiler said."""


def sources() -> list[Path]:
    """What the emulated library is made of."""
    return [p for folder in ("src", "emulator") for p in sorted((PLUGINS / folder).iterdir()) if p.suffix in SUFFIXES]


def build_emulator(
    cache: Path, extra: Sequence[Path] = (), flags: Sequence[str] = (), only_emulator: bool = False
) -> Path:
    """The library for this CPU, compiled into `cache` unless it is there already.

    `extra` are further .cu files; with `only_emulator` none of the library's own kernels are in it.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("no C++ compiler: install g++, or name one in CXX")
    headers = [p for p in sorted(PLUGINS.glob("*/*")) if p.suffix in {".h", ".cuh"}]
    common = hashlib.sha256(" ".join([compiler, *FLAGS, *flags]).encode())
    for header in headers:
        common.update(header.read_bytes())

    def compiled(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        # The kernels are many instances of templates, compiled longer than they run; the multiplication is run often.
        optimize = "-O3" if source.suffix == ".cpp" else "-O1"
        includes = [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'src'}"]
        return _made(target, [compiler, optimize, *FLAGS, *flags, *includes, "-x", "c++", "-c", str(source)])

    with ThreadPoolExecutor(2) as pool:
        own = [p for p in sources() if not only_emulator or p.suffix == ".cpp"]
        objects = list(pool.map(compiled, [*own, *extra]))
    names = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    return _made(cache / f"liborin_emulated-{names}.so", [compiler, "-shared", "-Wl,-Bsymbolic", *map(str, objects)])


def _made(target: Path, command: list[str]) -> Path:
    """`target`, made by `command -o target` where it is not there. Several test runs may share a cache."""
    if target.exists():
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(target)
    return target


class Memory(Protocol):
    """Where the kernels' buffers lie."""

    def put(self, content: NDArray[np.uint8]) -> tuple[int, Any]:
        """The address of a copy, a multiple of 256, and what keeps it alive."""

    def get(self, kept: Any) -> NDArray[np.uint8]:
        """What lies there now, all work done."""


class HostMemory:
    """The emulator's: numpy arrays."""

    def put(self, content: NDArray[np.uint8]) -> tuple[int, Any]:
        whole = np.empty(content.size + GUARD, np.uint8)
        start = -whole.ctypes.data % GUARD
        kept = whole[start : start + content.size]
        kept[:] = content
        return kept.ctypes.data, kept

    def get(self, kept: Any) -> NDArray[np.uint8]:
        copy: NDArray[np.uint8] = kept.copy()
        return copy


class GpuMemory:
    """A GPU's, through torch."""

    def put(self, content: NDArray[np.uint8]) -> tuple[int, Any]:
        import torch

        kept = torch.from_numpy(content.copy()).cuda()
        assert kept.data_ptr() % GUARD == 0
        return kept.data_ptr(), kept

    def get(self, kept: Any) -> NDArray[np.uint8]:
        import torch

        torch.cuda.synchronize()
        copy: NDArray[np.uint8] = kept.cpu().numpy()
        return copy


class Buffer:
    """An array where a kernel sees it, between two guards that no kernel may touch."""

    def __init__(self, memory: Memory, content: NDArray[Any]) -> None:
        self.memory, self.shape, self.dtype = memory, content.shape, content.dtype
        self.given = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        guard = np.full(GUARD, 0xFF, np.uint8)  # NaN to whoever reads it
        start, self._kept = memory.put(np.concatenate((guard, self.given, guard)))
        self.address = start + GUARD

    def read(self) -> NDArray[Any]:
        """What it holds now. AssertionError where a guard was written."""
        now = self.memory.get(self._kept)
        assert (now[:GUARD] == 0xFF).all(), "a kernel wrote before the buffer"
        assert (now[-GUARD:] == 0xFF).all(), "a kernel wrote behind the buffer"
        return now[GUARD:-GUARD].view(self.dtype).reshape(self.shape)

    def unchanged(self) -> bool:
        return bool((self.read().reshape(-1).view(np.uint8) == self.given).all())


class Int4LinearArgs(ctypes.Structure):
    """`orin_int4_linear_args`."""

    _fields_ = [
        *((name, c_int32) for name in ("rows", "n", "k", "group_size", "activation")),
        *((name, c_void_p) for name in ("x", "weight", "scales", "bias", "y")),
    ]


class KvAttentionArgs(ctypes.Structure):
    """`orin_kv_attention_args`."""

    _fields_ = [
        *((name, c_int32) for name in ("batch", "tokens", "num_heads", "kv_num_heads", "head_dim", "max_len")),
        *((name, c_int32) for name in ("max_positions", "int8_cache")),
        *((name, c_float) for name in ("scale", "norm_epsilon")),
        *((name, c_void_p) for name in ("qkv", "key_cache", "value_cache", "past_lengths", "cos", "sin")),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "key_scale", "value_scale", "y")),
    ]


class EmbeddingArgs(ctypes.Structure):
    """`orin_embedding_args`."""

    _fields_ = [
        *((name, c_int32) for name in ("tokens", "vocab", "hidden", "bits", "group_size", "layout", "fp32_output")),
        *((name, c_void_p) for name in ("ids", "table", "scales", "y")),
    ]


ARGUMENTS: dict[str, tuple[Any, list[Any]]] = {
    "orin_last_error": (ctypes.c_char_p, []),
    "orin_version": (ctypes.c_char_p, []),
    "orin_int4_linear_workspace": (c_size_t, [c_int32] * 3),
    "orin_int4_linear": (c_int32, [ctypes.POINTER(Int4LinearArgs), c_void_p, c_size_t, c_void_p]),
    "orin_kv_attention_workspace": (c_size_t, [c_int32] * 6),
    "orin_kv_attention": (c_int32, [ctypes.POINTER(KvAttentionArgs), c_void_p, c_size_t, c_void_p]),
    "orin_skip_rms_norm": (c_int32, [*[c_void_p] * 5, c_int32, c_int32, c_float, c_void_p]),
    "orin_embedding_gather": (c_int32, [ctypes.POINTER(EmbeddingArgs), c_void_p]),
    "orin_argmax_workspace": (c_size_t, [c_int32] * 2),
    "orin_argmax": (c_int32, [c_void_p, *[c_int32] * 3, c_void_p, c_void_p, c_size_t, c_void_p]),
}


class KernelError(RuntimeError):
    """A call that did not return ORIN_OK."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Kernels:
    """The C interface of one library, with the memory it works on."""

    BAD_ARGUMENT, SMALL_WORKSPACE, CUDA_ERROR = 1, 2, 3

    def __init__(self, library: Path, memory: Memory) -> None:
        self.library, self.memory = ctypes.CDLL(str(library)), memory
        for name, (result, arguments) in ARGUMENTS.items():
            function = getattr(self.library, name, None)
            if function is not None:
                function.restype, function.argtypes = result, arguments

    @property
    def emulated(self) -> bool:
        return isinstance(self.memory, HostMemory)

    def configure(self, seed: int, sms: int = 16) -> None:
        """The emulator's order of threads (0 ascending, else shuffled) and how many multiprocessors it claims."""
        self.library.orin_emulator_configure(c_uint64(seed), sms)

    def put(self, array: NDArray[Any]) -> Buffer:
        return Buffer(self.memory, array)

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> Buffer:
        """Filled with bytes 0xff: NaN, or -1."""
        count = int(np.prod(shape))
        return self.put(np.full(count * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape))

    def workspace(self, function: str, *arguments: int) -> Buffer:
        """As many bytes as `function` says."""
        return self.empty(int(getattr(self.library, function)(*arguments)), np.uint8)

    def call(self, function: str, *arguments: Any, inputs: Sequence[Buffer] = (), stream: int | None = None) -> None:
        """Raises KernelError with the library's own words; AssertionError where an input was written."""
        passed = [a.address if isinstance(a, Buffer) else a for a in arguments]
        status = getattr(self.library, function)(*passed, stream)
        if status:
            raise KernelError(status, self.library.orin_last_error().decode())
        assert all(one.unchanged() for one in inputs), f"{function} changed one of its inputs"
