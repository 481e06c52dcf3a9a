"""Every call of TensorRT and pycuda is in the tables, and the tables are what the packages have.

The second part needs the packages: `ORIN_TENSORRT_BINDINGS` names folders of unpacked bindings wheels, separated by
colons (an installed package is found without it), `ORIN_PYCUDA_SOURCE` pycuda's source.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from api_uses import Table, Uses, attributes, load_table, uses
from check_tensorrt_api import (
    PYCUDA_TABLE,
    TENSORRT_TABLE,
    compare,
    compare_pycuda,
    parse_signatures,
    read_bindings,
    read_pycuda,
)

from orin_kit.engine import cuda, trt

ENGINE = Path(trt.__file__).parent
SOURCES = {
    "tensorrt": (ENGINE / "trt.py", TENSORRT_TABLE, ("trt", "self._trt")),
    "pycuda": (ENGINE / "cuda.py", PYCUDA_TABLE, ("cuda", "self._cuda")),
}


def read(name: str) -> tuple[str, Table, tuple[str, ...]]:
    source, table, names = SOURCES[name]
    return source.read_text("utf-8"), load_table(table), names


@pytest.mark.parametrize("name", SOURCES)
def test_the_module_uses_what_the_table_says_and_the_table_nothing_else(name: str) -> None:
    source, table, names = read(name)
    found = uses(source, table, names)
    assert found.wrong == []
    assert set(found.used) == {(owner, attribute) for owner, attribute, _ in attributes(table)}
    # What is not followed is not the library's: each expression is known, so that none of the library's hides there.
    assert sorted(found.python) == sorted(table["python"])


@pytest.mark.parametrize("name", ["tensorrt", "pycuda"])
def test_nobody_else_imports_the_library(name: str) -> None:
    """One thin module for each."""
    for file in ENGINE.parent.rglob("*.py"):
        if file == SOURCES[name][0] or "doctor" in file.parts:  # doctor asks in processes of its own
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(each.partition(".")[0] == name for each in names), file


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (("execute_async_v3", "execute_async_v2"), "the table has no IExecutionContext.execute_async_v2"),
        (("ignore_mismatch=False", "ignore=False"), "IBuilderConfig.set_timing_cache takes"),
        (("set_device_memory(memory, size)", "set_device_memory(memory, size, 0)"), "set_device_memory takes"),
        (("def step_complete(self, phase_name", "def step_complete(self, phase"), "IProgressMonitor.step_complete"),
        (("config.max_aux_streams = 0", "config.max_aux_stream = 0"), "no IBuilderConfig.max_aux_stream"),
        (("self.raw.num_layers", "self.raw.num_layers()"), "ICudaEngine.num_layers is a property"),
        (("trt.MemoryPoolType.WORKSPACE", "trt.MemoryPoolType.SCRATCH"), "no MemoryPoolType.SCRATCH"),
    ],
)
def test_a_wrong_call_is_found(change: tuple[str, str], wrong: str) -> None:
    source, table, names = read("tensorrt")
    assert change[0] in source
    found: Uses = uses(source.replace(*change), table, names)
    assert any(wrong in line for line in found.wrong), found.wrong


def test_signatures_of_pybind11() -> None:
    doc = """f(*args, **kwargs)
Overloaded function.

1. f(self: a.b.C, flags: int = 0, names: Dict[str, int] = {}) -> a.b.INetwork

2. f(self: a.b.C, other: nv::v_1::X = <X.Y: 0>) -> None
"""
    assert parse_signatures("f", doc) == [(["flags", "names"], "INetwork"), (["other"], "None")]
    assert parse_signatures("p", "(arg0: a.b.C) -> int\n") == [([], "int")]


def bindings() -> Iterator[Path]:
    yield from (Path(folder) for folder in os.environ.get("ORIN_TENSORRT_BINDINGS", "").split(":") if folder)
    for package in ("tensorrt-cu12-bindings", "tensorrt-cu13-bindings"):
        try:
            yield Path(str(metadata.distribution(package).locate_file("")))
        except metadata.PackageNotFoundError:
            continue


@pytest.mark.skipif(not any(bindings()), reason="ORIN_TENSORRT_BINDINGS names no bindings, and none are installed")
def test_the_table_is_what_the_bindings_have() -> None:
    table = load_table(TENSORRT_TABLE)
    for folder in bindings():
        version, found = read_bindings(folder, table)
        wrong, compared = compare(table, version, found)
        assert wrong == [] and compared == len(list(attributes(table)))
        for owner, name, entry in list(attributes(table)):  # and a table that were wrong would be told
            changed: dict[str, Any] = copy.deepcopy(table)
            if entry.get("arguments") and "seen" not in entry:
                changed["classes"][owner][name]["arguments"][0] += "_"
                assert compare(changed, version, found)[0], (owner, name)


@pytest.mark.skipif("ORIN_PYCUDA_SOURCE" not in os.environ, reason="ORIN_PYCUDA_SOURCE does not say where pycuda is")
def test_the_table_is_what_pycuda_documents() -> None:
    assert compare_pycuda(load_table(PYCUDA_TABLE), read_pycuda(Path(os.environ["ORIN_PYCUDA_SOURCE"]))) == []


TYPES = {
    "CUstream": ctypes.c_void_p, "CUgraph": ctypes.c_void_p, "CUgraphExec": ctypes.c_void_p,
    "CUgraph *": ctypes.POINTER(ctypes.c_void_p), "CUgraphExec *": ctypes.POINTER(ctypes.c_void_p),
    "CUstreamCaptureMode": ctypes.c_int, "CUresult": ctypes.c_int, "unsigned long long": ctypes.c_ulonglong,
    "const char **": ctypes.POINTER(ctypes.c_char_p),
}  # fmt: skip


@pytest.mark.skipif("ORIN_CUDA_HEADER" not in os.environ, reason="ORIN_CUDA_HEADER does not say where cuda.h is")
def test_the_driver_is_called_as_its_header_says() -> None:
    text = Path(os.environ["ORIN_CUDA_HEADER"]).read_text("utf-8", "replace")
    renamed = dict(re.findall(r"#define\s+(cu\w+)\s+(?:__CUDA_API_PTSZ\()?(cu\w+)\)?", text[: text.index("extern")]))
    for name, arguments in cuda.DRIVER.items():
        declared = next((old for old, new in renamed.items() if new == name and old != name), name)
        prototype = re.search(rf"CUresult CUDAAPI {declared}\(([^)]*)\)", text)
        assert prototype is not None, name
        types = [re.sub(r"\s*\w+$", "", part.strip()) for part in prototype[1].split(",")]
        assert tuple(TYPES[each] for each in types) == arguments, (name, types)
