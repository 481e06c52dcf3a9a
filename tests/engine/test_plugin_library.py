"""The plugin library's C functions are called as the header declares them; other files are refused in words."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from orin_kit.engine import plugin_library
from orin_kit.engine.plugin_library import PROTOTYPES, VARIABLE, PluginLibrary, claim, find_library, library_record
from orin_kit.errors import OrinKitError, UserError

HEADER = Path(__file__).parents[2] / "jetson/plugins/include/orin_kernels.h"
TYPES = {
    "const char*": ctypes.c_char_p, "size_t": ctypes.c_size_t, "int32_t": ctypes.c_int32, "orin_status": ctypes.c_int,
    "const void*": ctypes.c_void_p, "void*": ctypes.c_void_p, "int64_t*": ctypes.c_void_p,
    "orin_stream": ctypes.c_void_p,
}  # fmt: skip
# Functions as the header declares them, which remember what they were given: a library for these tests, not ours.
STAND_IN = """
#include "orin_kernels.h"
#include <string.h>
const char* orin_last_error(void) { return "rows is 0"; }
const char* orin_version(void) { return "0.1.0 sm_87 sm_90"; }
size_t orin_argmax_workspace(int32_t rows, int32_t vocab) { return (size_t)rows * 1000 + vocab; }
orin_status orin_argmax(const void* logits, int32_t fp16, int32_t rows, int32_t vocab, int64_t* index,
                        void* workspace, size_t bytes, orin_stream stream) {
  const float* x = logits;
  if (fp16 || !rows || bytes != orin_argmax_workspace(rows, vocab) || workspace != (void*)0x700000000008
      || stream != (orin_stream)0x7fffffff0001) return ORIN_BAD_ARGUMENT;
  for (int r = 0; r < rows; ++r) {
    index[r] = 0;
    for (int i = 1; i < vocab; ++i) if (x[r * vocab + i] > x[r * vocab + index[r]]) index[r] = i;
  }
  return ORIN_OK;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("library") / "liborin_plugins.so", STAND_IN)


def compiled(path: Path, source: str) -> Path:
    (path.parent / "source.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", f"-I{HEADER.parent}", str(path.parent / "source.c"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def test_prototypes_are_the_header_s() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text("utf-8"), flags=re.DOTALL)
    for name, (returned, arguments) in PROTOTYPES.items():
        prototype = re.search(rf"ORIN_API ([\w* ]+?)\s*{name}\(([^)]*)\)", text)
        assert prototype is not None, name
        assert TYPES[prototype[1]] is returned
        types = [re.sub(r"\s*\w+$", "", part.strip()) for part in prototype[2].split(",") if part.strip() != "void"]
        assert tuple(TYPES[each] for each in types) == arguments


def test_arguments_arrive(library: Path) -> None:
    """64-bit addresses and handles reach C whole."""
    plugins = PluginLibrary(library)
    assert plugins.version == "0.1.0" and plugins.sms == {87, 90}
    assert plugins.argmax_workspace(3, 11) == 3011
    logits, index = (ctypes.c_float * 6)(1, 5, 2, 9, 3, 3), (ctypes.c_int64 * 2)()
    where = ctypes.addressof(logits), 2, 3, ctypes.addressof(index), 0x700000000008, 2003, 0x7FFFFFFF0001
    plugins.argmax(*where)
    assert list(index) == [1, 0]
    with pytest.raises(OrinKitError, match="orin_argmax: rows is 0"):
        plugins.argmax(where[0], 0, *where[2:])


def test_another_gpu(library: Path) -> None:
    PluginLibrary(library).check_sm(87)
    with pytest.raises(UserError, match=r"built for sm_87, sm_90, this GPU is sm_89.*CUDA_ARCHITECTURES=89"):
        PluginLibrary(library).check_sm(89)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(UserError, match=r"does not load.*text.so"):
        PluginLibrary(tmp_path / "text.so")
    with pytest.raises(UserError, match="has no function orin_last_error"):
        PluginLibrary(compiled(tmp_path / "other.so", "int nothing;"))


def test_where_it_is_looked_for(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(library))
    assert find_library(None) == library
    with pytest.raises(UserError, match=r"no plugin library .*gone.so.*correct --plugins"):
        find_library(tmp_path / "gone.so")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(UserError, match=f"correct {VARIABLE}"):
        find_library(None)
    assert find_library(library) == library
    assert library_record(library)["name"] == "liborin_plugins.so"


def test_one_library_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_library, "_claimed", {})
    claim("a", Path("one"))
    claim("a", Path("two"))
    with pytest.raises(UserError, match="three and (one|two) were built with different plugin libraries"):
        claim("b", Path("three"))
