"""The plugin library's plain C functions (`jetson/plugins/include/orin_kernels.h`), called by ctypes.

`tests/engine/test_plugin_library.py` compares the prototypes here with the header.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from orin_kit.errors import OrinKitError, UserError
from orin_kit.manifest import sha256_file

PLUGIN_LIBRARY = "liborin_plugins.so"
VARIABLE = "ORIN_KIT_PLUGINS"  # a path to the library
OK = 0
# Function -> what it returns, and its arguments.
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "orin_last_error": (ctypes.c_char_p, ()),
    "orin_version": (ctypes.c_char_p, ()),
    "orin_argmax_workspace": (ctypes.c_size_t, (ctypes.c_int32, ctypes.c_int32)),
    "orin_argmax": (
        ctypes.c_int,
        (
            ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_size_t, ctypes.c_void_p,
        ),
    ),
}  # fmt: skip


_claimed: dict[str, Path] = {}  # sha256 of the library that this process's registry has


class PluginLibrary:
    """The library, loaded.

    Attributes:
        path: of the file.
        version: as it says itself, "0.1.0".
        sms: the architectures it was built for, {87}.

    Raises:
        UserError: it does not load or is another library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        mend = "build jetson/plugins on this machine and give its library with --plugins"
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UserError(f"the plugin library does not load: {error}", mend=mend) from error
        for name, (returned, arguments) in PROTOTYPES.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise UserError(f"{path} has no function {name}", mend=mend)
            function.restype, function.argtypes = returned, arguments
        self.version, *architectures = str(self._library.orin_version(), "utf-8").split()
        self.sms = frozenset(int(name.removeprefix("sm_")) for name in architectures)

    def check_sm(self, sm: int) -> None:
        """Raises UserError when the library has no kernels for a device."""
        if sm not in self.sms:
            built = ", ".join(f"sm_{one}" for one in sorted(self.sms))
            what = f"{self.path} was built for {built}, this GPU is sm_{sm}"
            raise UserError(what, mend=f"build jetson/plugins with -DCMAKE_CUDA_ARCHITECTURES={sm}")

    def argmax_workspace(self, rows: int, vocab: int) -> int:
        """Bytes of device memory that `argmax` works in."""
        return int(self._library.orin_argmax_workspace(rows, vocab))

    def argmax(
        self, logits: int, rows: int, vocab: int, index: int, workspace: int, workspace_bytes: int, stream: int
    ) -> None:
        """Put the index of each row's largest logit on a stream.

        Args:
            logits: device address, fp32 `[rows, vocab]`.
            rows: of the logits.
            vocab: of the logits.
            index: device address, int64 `[rows]`.
            workspace: device address of `workspace_bytes`.
            workspace_bytes: see `argmax_workspace`.
            stream: a CUstream.
        """
        status = self._library.orin_argmax(logits, 0, rows, vocab, index, workspace, workspace_bytes, stream)
        if status != OK:
            said = str(self._library.orin_last_error(), "utf-8")
            raise OrinKitError(f"orin_argmax: {said}", mend="report it")


def find_library(given: Path | None) -> Path | None:
    """The plugin library: the one given, the one that `ORIN_KIT_PLUGINS` names, else in the environment's
    `lib` or a checkout's build.

    Raises:
        UserError: the file that was named does not exist.
    """
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        if not named.is_file():
            whose = "--plugins" if given else VARIABLE
            raise UserError(f"there is no plugin library {named}", mend=f"correct {whose}, or build jetson/plugins")
        return named
    folders = (Path(sys.prefix) / "lib", Path(__file__).parents[2] / "jetson/plugins/build")
    return next((folder / PLUGIN_LIBRARY for folder in folders if (folder / PLUGIN_LIBRARY).is_file()), None)


def library_record(path: Path) -> dict[str, str]:
    """How a manifest names a library."""
    return {"name": path.name, "sha256": sha256_file(path)}


def claim(sha256: str, directory: Path) -> None:
    """Say that this process uses one library's plugins: TensorRT keeps the first ones registered under a name.

    Raises:
        UserError: an engine opened before has another library.
    """
    other = next((path for known, path in _claimed.items() if known != sha256), None)
    if other is not None:
        what = f"{directory} and {other} were built with different plugin libraries"
        raise UserError(what, mend="open them in processes of their own, or build one of them again")
    _claimed[sha256] = directory
