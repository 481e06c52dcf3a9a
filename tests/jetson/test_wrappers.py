"""The TensorRT plugins compiled and called, where TensorRT's headers are at hand.

`ORIN_TENSORRT_INCLUDE` names the folders that have NvInferRuntime.h, several with a colon between. TensorRT itself is
not run: `wrapper_driver.cpp` asks what it would ask, and the kernels are the emulator's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_char_p, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels import PLUGINS, EmbeddingArgs, Int4LinearArgs, Kernels, KvAttentionArgs
from orin_kit.export.interleave import interleave
from orin_kit.models.packing import PackedWeight, pack

WRAPPERS = PLUGINS / "tensorrt"
HEADERS = [Path(folder) for folder in os.environ.get("ORIN_TENSORRT_INCLUDE", "").split(os.pathsep) if folder]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

Array = NDArray[Any]
TENSORRT = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "int64": 8}  # nvinfer1::DataType
FIELD_FLOAT, FIELD_INT, FIELD_CHAR = 1, 5, 6  # nvinfer1::PluginFieldType


class Field(ctypes.Structure):
    """`FieldArg` of the driver."""

    _fields_ = [("name", c_char_p), ("type", c_int32), ("length", c_int32), ("data", c_void_p)]


class Tensor(ctypes.Structure):
    """`TensorArg` of the driver."""

    _fields_ = [("type", c_int32), ("rank", c_int32), ("dims", c_int64 * 8), ("address", c_void_p)]


def cuda_include() -> Path | None:
    """Where cuda_runtime_api.h is, which TensorRT's headers include."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").exists()), None)


VERSIONS: list[Path | None] = [*HEADERS] or [None]


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda folder: str(folder or "no headers"))
def library(
    request: pytest.FixtureRequest, emulator: Kernels, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The plugins compiled against one version's headers, linked with the emulated kernels and the driver."""
    headers: Path | None = request.param
    if headers is None:
        pytest.skip("ORIN_TENSORRT_INCLUDE names no folder with NvInferRuntime.h")
    assert (headers / "NvInferRuntime.h").exists(), f"ORIN_TENSORRT_INCLUDE: no NvInferRuntime.h in {headers}"
    cuda = cuda_include()
    if cuda is None:
        pytest.skip("no cuda_runtime_api.h: install the CUDA toolkit, or name it in CUDA_HOME")
    assert COMPILER is not None
    home = tmp_path_factory.mktemp("wrappers")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{PLUGINS / 'include'}", "-isystem", str(headers), "-isystem", str(cuda)]

    def compiled(source: Path) -> Path:
        target = home / f"{source.stem}.o"
        done = subprocess.run(
            [str(COMPILER), *flags, "-c", str(source), "-o", str(target)], capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(
            pool.map(compiled, [*sorted(WRAPPERS.glob("*.cpp")), Path(__file__).parent / "wrapper_driver.cpp"])
        )
    kernels = Path(str(emulator.library._name))
    out = home / "libwrappers.so"
    link = [COMPILER, "-shared", "-Wl,--no-undefined", *map(str, objects), str(kernels), f"-Wl,-rpath,{kernels.parent}"]
    subprocess.run([*link, "-o", str(out)], check=True)
    yield out


def test_they_need_nothing_of_libnvinfer(library: Path) -> None:
    """Programs without TensorRT open the library too."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm: install binutils")
    listed = subprocess.run([nm, "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    assert not [
        name for name in listed.split() if "nvinfer" in name or "getPluginRegistry" in name or name == "getLogger"
    ]
    exported = subprocess.run([nm, "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    assert {"getCreators", "setLoggerFinder"} <= set(exported.split())


class Driver:
    """The plugins of one library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.drive.restype = self.library.driver_said.restype = c_char_p

    def run(
        self, op: str, attributes: dict[str, Any], inputs: list[Array], outputs: list[Array], aliased: int = 0
    ) -> tuple[str, str]:
        """Calls a plugin from creation to enqueue. Returns what it said and its timing cache's key.

        Raises:
            ValueError: with the step that failed and what the plugin said.
        """
        keep: list[Any] = []

        def field(name: str, value: Any) -> Field:
            if isinstance(value, str):
                data: Any = ctypes.create_string_buffer(value.encode())
                kind, length = FIELD_CHAR, len(value) + 1
            else:
                data = ctypes.c_float(value) if isinstance(value, float) else c_int32(value)
                kind, length = FIELD_FLOAT if isinstance(value, float) else FIELD_INT, 1
            keep.append(data)
            return Field(name.encode(), kind, length, ctypes.cast(ctypes.pointer(data), c_void_p))

        def tensor(array: Array) -> Tensor:
            dims = (c_int64 * 8)(*array.shape)
            return Tensor(TENSORRT[array.dtype.name], array.ndim, dims, array.ctypes.data)

        fields = (Field * max(1, len(attributes)))(*(field(*item) for item in attributes.items()))
        tensors = (Tensor * (len(inputs) + len(outputs)))(*map(tensor, [*inputs, *outputs]))
        status, key = c_int(), ctypes.create_string_buffer(256)
        step = self.library.drive(
            op.encode(), fields, len(attributes), tensors, len(inputs), len(outputs), ctypes.byref(status), key
        )
        said = self.library.driver_said().decode()
        if step or status.value:
            raise ValueError(f"{step.decode() or 'enqueue'}: {said}")
        return said, key.value.decode()


@pytest.fixture(scope="module")
def driver(library: Path) -> Driver:
    return Driver(library)


def aligned(array: Array) -> Array:
    """A copy at a multiple of 256 bytes, as TensorRT has its tensors."""
    whole = np.empty(array.nbytes + 256, np.uint8)
    start = -whole.ctypes.data % 256
    copy: Array = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def nothing(*shape: int, dtype: Any = np.float16) -> Array:
    return aligned(np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape))


def random_int4(rng: np.random.Generator, n: int, k: int) -> Array:
    packed = pack(rng.integers(0, 16, (n, k), dtype=np.uint8))
    return interleave(PackedWeight(4, packed, np.ones((n, k // 64), np.float16)))


@pytest.mark.parametrize(("bias", "activation"), [(False, "none"), (True, "none"), (True, "silu_gate")])
def test_int4_linear(emulator: Kernels, driver: Driver, rng: np.random.Generator, bias: bool, activation: str) -> None:
    emulator.configure(0)
    n, k, group, rows = 48, 256, 64, (2, 5)
    x, scales = rng.standard_normal((*rows, k)), rng.uniform(0.01, 0.1, (k // group, n))
    inputs = [aligned(x.astype(np.float16)), aligned(random_int4(rng, n, k)), aligned(scales.astype(np.float16))]
    inputs += [aligned(rng.standard_normal(n).astype(np.float16))] if bias else []
    wide = n // 2 if activation == "silu_gate" else n
    y, direct = nothing(*rows, wide), nothing(*rows, wide)
    attributes = {"N": n, "K": k, "group_size": group, "activation": activation}
    _, key = driver.run("Int4Linear", attributes, inputs, [y])
    assert key == f"N={n},K={k},group_size={group},activation={activation}"
    names = ("x", "weight", "scales", "bias")
    args = Int4LinearArgs(
        rows=10, n=n, k=k, group_size=group, activation=int(activation == "silu_gate"), y=direct.ctypes.data,
        **{name: array.ctypes.data for name, array in zip(names, inputs, strict=False)},
    )  # fmt: skip
    workspace = nothing(emulator.library.orin_int4_linear_workspace(10, n, k) + 256, dtype=np.uint8)
    emulator.call("orin_int4_linear", ctypes.byref(args), workspace.ctypes.data, workspace.size)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y, direct)


@pytest.mark.parametrize("residual", [False, True])
def test_skip_rms_norm(emulator: Kernels, driver: Driver, rng: np.random.Generator, residual: bool) -> None:
    emulator.configure(0)
    x, more, weight = (aligned(rng.standard_normal(s).astype(np.float16)) for s in ((2, 3, 64), (2, 3, 64), 64))
    y, total, direct, direct_total = (nothing(2, 3, 64) for _ in range(4))
    driver.run("SkipRmsNorm", {"epsilon": 1e-5}, [x, weight, more] if residual else [x, weight], [y, total])
    third, fourth = (more.ctypes.data, direct_total.ctypes.data) if residual else (None, None)
    emulator.call(
        "orin_skip_rms_norm", x.ctypes.data, weight.ctypes.data, third, direct.ctypes.data, fourth, 6, 64, 1e-5
    )
    np.testing.assert_array_equal(y, direct)
    np.testing.assert_array_equal(total, direct_total)  # NaN on both sides where there is no residual


@pytest.mark.parametrize(("layout", "words"), [("rows", True), ("rows", False), ("int4_linear", True)])
@pytest.mark.parametrize("output", [np.float16, np.float32])
def test_embedding_gather(
    emulator: Kernels, driver: Driver, rng: np.random.Generator, layout: str, words: bool, output: Any
) -> None:
    emulator.configure(0)
    vocab, hidden, group, bits = 40, 256, 32, 8 if layout == "rows" else 4
    ids = aligned(rng.integers(0, vocab, (2, 3)))
    if layout == "rows":
        codes = rng.integers(-128, 128, (vocab, hidden), dtype=np.int8)
        table, scales = codes.view(np.int32) if words else codes, rng.uniform(0.01, 0.1, (vocab, hidden // group))
    else:
        table, scales = random_int4(rng, vocab, hidden), rng.uniform(0.01, 0.1, (hidden // group, vocab))
    table, scales = aligned(table), aligned(scales.astype(np.float16))
    y, direct = nothing(2, 3, hidden, dtype=output), nothing(2, 3, hidden, dtype=output)
    how = {"bits": bits, "group_size": group, "hidden_size": hidden, "layout": layout}
    driver.run("EmbeddingGather", how | {"output_type": 10 if output is np.float16 else 1}, [ids, table, scales], [y])
    args = EmbeddingArgs(
        tokens=6, vocab=vocab, hidden=hidden, bits=bits, group_size=group, layout=int(layout == "int4_linear"),
        fp32_output=int(output is np.float32), ids=ids.ctypes.data, table=table.ctypes.data, scales=scales.ctypes.data,
        y=direct.ctypes.data,
    )  # fmt: skip
    emulator.call("orin_embedding_gather", ctypes.byref(args))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y, direct)


def attention_inputs(rng: np.random.Generator, tokens: int, int8: bool, qk_norm: bool) -> dict[str, Array]:
    """Two sequences, 4 query and 2 kv heads of 64, a cache of 50; by the names of orin_kv_attention_args."""
    cache = (2, 2, 50, 64)
    made: dict[str, Array] = {"qkv": rng.standard_normal((2, tokens, 8 * 64)).astype(np.float16)}
    for name in ("key_cache", "value_cache"):
        random = rng.integers(-128, 128, cache, dtype=np.int8) if int8 else rng.standard_normal(cache)
        made[name] = random if int8 else random.astype(np.float16)
    made["past_lengths"] = np.array([3, 20], np.int32)
    made |= {name: rng.uniform(-1, 1, (60, 32)).astype(np.float32) for name in ("cos", "sin")}
    if qk_norm:
        made |= {name: rng.uniform(0.5, 2, 64).astype(np.float16) for name in ("q_norm", "k_norm")}
    if int8:
        made |= {n: rng.uniform(0.01, 0.1, (1, 2, 1, 64)).astype(np.float32) for n in ("key_scale", "value_scale")}
    return {name: aligned(array) for name, array in made.items()}


ATTENTION: dict[str, Any] = {
    "num_heads": 4, "kv_num_heads": 2, "head_dim": 64, "scale": 0.125, "qk_norm": 0, "norm_epsilon": 1e-6
}  # fmt: skip


@pytest.mark.parametrize("tokens", [2, 12])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("in_place", [True, False])
def test_kv_attention(
    emulator: Kernels,
    driver: Driver,
    rng: np.random.Generator,
    tokens: int,
    int8: bool,
    qk_norm: bool,
    in_place: bool,
) -> None:
    """Also where TensorRT did not alias the caches: right, with a warning."""
    emulator.configure(0)
    inputs = attention_inputs(rng, tokens, int8, qk_norm)
    own = {name: aligned(array) for name, array in inputs.items()}
    y, direct = nothing(2, tokens, 256), nothing(2, tokens, 256)
    caches = [inputs["key_cache"], inputs["value_cache"]]
    outputs = caches if in_place else [aligned(cache) for cache in caches]
    said, _ = driver.run("KvAttention", {**ATTENTION, "qk_norm": int(qk_norm)}, [*inputs.values()], [y, *outputs])
    assert ("the cache is copied in every call" in said) == (not in_place)
    args = KvAttentionArgs(
        batch=2, tokens=tokens, num_heads=4, kv_num_heads=2, head_dim=64, max_len=50, max_positions=60,
        int8_cache=int(int8), scale=0.125, norm_epsilon=1e-6, y=direct.ctypes.data,
        **{name: array.ctypes.data for name, array in own.items()},
    )  # fmt: skip
    workspace = nothing(emulator.library.orin_kv_attention_workspace(2, tokens, 4, 2, 64, 50), dtype=np.uint8)
    emulator.call("orin_kv_attention", ctypes.byref(args), workspace.ctypes.data, workspace.size)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y, direct)
    np.testing.assert_array_equal(outputs[0], own["key_cache"])
    np.testing.assert_array_equal(outputs[1], own["value_cache"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": None}, "createPlugin: KvAttention node: the attribute scale is missing: export the model again"),
        ({"scale": 1}, "the attribute scale is not one float"),
        ({"head_dim": 80}, "KvAttention node: head_dim is 80, want 64 or 128"),
        ({"num_heads": 3}, "num_heads 3 is no multiple of kv_num_heads 2"),
    ],
)
def test_creators_refuse(driver: Driver, rng: np.random.Generator, changed: dict[str, Any], message: str) -> None:
    attributes = {name: value for name, value in {**ATTENTION, **changed}.items() if value is not None}
    inputs = attention_inputs(rng, 1, False, False)
    outputs = [nothing(2, 1, 256), inputs["key_cache"], inputs["value_cache"]]
    with pytest.raises(ValueError, match=message):
        driver.run("KvAttention", attributes, [*inputs.values()], outputs)


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("Int4Linear", dict(N=48, K=100, group_size=64, activation="none"), "K is 100, want a multiple of 128"),
        ("Int4Linear", dict(N=8, K=128, group_size=64, activation="silu_gate"), "N is 8, want a multiple of 16"),
        ("Int4Linear", dict(N=8, K=128, group_size=64, activation="gelu"), 'activation is "gelu"'),
        ("Int4Linear", dict(N=8, K=128, group_size=16, activation="none"), "group_size is 16, want 32, 64 or 128"),
        ("SkipRmsNorm", dict(epsilon=-1.0), "epsilon is -1.0+, want 0 or more"),
        (
            "EmbeddingGather",
            dict(bits=2, group_size=32, hidden_size=64, layout="rows", output_type=10),
            "bits is 2, want 4 or 8",
        ),
        (
            "EmbeddingGather",
            dict(bits=4, group_size=32, hidden_size=64, layout="rows", output_type=16),
            "output_type is 16",
        ),
        ("EmbeddingGather", dict(bits=4, group_size=32, hidden_size=64, layout="tiles", output_type=1), "layout is"),
    ],
)
def test_other_creators_refuse(driver: Driver, op: str, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"createPlugin: {op} node: {message}"):
        driver.run(op, attributes, [], [])


def test_shapes_that_do_not_fit_are_said(driver: Driver, rng: np.random.Generator) -> None:
    inputs = attention_inputs(rng, 1, False, False)
    inputs["cos"] = aligned(np.zeros((60, 16), np.float32))
    outputs = [nothing(2, 1, 256), inputs["key_cache"], inputs["value_cache"]]
    with pytest.raises(ValueError, match=r"configurePlugin: KvAttention: cos is \[60, 16\], want \[60, 32\]"):
        driver.run("KvAttention", ATTENTION, [*inputs.values()], outputs)
    inputs.pop("sin")
    with pytest.raises(
        ValueError, match="configurePlugin: KvAttention: 5 inputs, want 6 or, with an int8 cache, two more"
    ):
        driver.run("KvAttention", ATTENTION, [*inputs.values()], outputs)


def test_types_that_do_not_fit_are_refused(driver: Driver, rng: np.random.Generator) -> None:
    """An int8 cache without its scales."""
    inputs = attention_inputs(rng, 1, True, False)
    outputs = [nothing(2, 1, 256), inputs["key_cache"], inputs["value_cache"]]
    with pytest.raises(ValueError, match="supportsFormatCombination"):
        driver.run("KvAttention", ATTENTION, list(inputs.values())[:6], outputs)
