"""Which JetPack a machine has, and what that JetPack brings: the texts NVIDIA leaves on a Jetson, as data.

Everything is read below a root directory, so that a copied tree can be examined as well as `/`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TEGRA_RELEASE = "etc/nv_tegra_release"
DEVICE_TREE_MODEL = "proc/device-tree/model"
CUDA_HOME = "usr/local/cuda"
# The distribution's own folders first; the others are where tar files and containers put it.
LIBRARY_FOLDERS = ("usr/lib/aarch64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib", "usr/local/tensorrt/lib")

Version = tuple[int, ...]


@dataclass(frozen=True)
class JetPack:
    """A JetPack that orin-kit is made for.

    Attributes:
        name: NVIDIA's, "6.2".
        l4t: the oldest Jetson Linux release that it may be; every later one of the same major release will do.
        ubuntu: release of the system, "22.04".
        python: the system's Python, the only one that NVIDIA's TensorRT bindings are installed for.
        cuda, tensorrt: versions, as far as they must agree.
    """

    name: str
    l4t: Version
    ubuntu: str
    python: Version
    cuda: Version
    tensorrt: Version


# NVIDIA's release notes; the package versions are those of repo.download.nvidia.com/jetson (r36.5 and r39.2).
JETPACKS = (
    JetPack("6.2", (36, 4, 3), "22.04", (3, 10), (12, 6), (10, 3)),
    JetPack("7.2", (39, 2), "24.04", (3, 12), (13, 2), (10, 16)),
)
# Jetson Linux release -> JetPack, as NVIDIA names them.
NAMES: dict[Version, str] = {
    (36, 3): "6.0", (36, 4): "6.1", (36, 4, 2): "6.1", (36, 4, 3): "6.2", (36, 4, 4): "6.2.1", (36, 4, 7): "6.2.1",
    (36, 5): "6.2.2", (36, 5, 2): "6.2.3", (38, 2): "7.0", (38, 4): "7.1", (39, 2): "7.2", (39, 2, 1): "7.2.1",
}  # fmt: skip


def version(text: str) -> Version:
    """The numbers that a version begins with: "10.3.0.30-1+cuda12.5" -> (10, 3, 0, 30)."""
    return tuple(int(part) for part in (re.match(r"[\d.]*", text) or [""])[0].split(".") if part)


def dotted(numbers: Iterable[int]) -> str:
    return ".".join(str(number) for number in numbers)


def parse_l4t(text: str) -> Version | None:
    """The Jetson Linux release in `/etc/nv_tegra_release`: "# R36 (release), REVISION: 4.3, ..." -> (36, 4, 3).

    A last part of 0 is left out, so that R39.2 and R39.2.0 are the same.
    """
    found = re.match(r"# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    if not found:
        return None
    numbers = [int(found[1]), *version(found[2])]
    while len(numbers) > 2 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def read_l4t(root: Path) -> Version | None:
    """None where the file is missing or says something else."""
    return parse_l4t(read_text(root / TEGRA_RELEASE) or "")


def jetpack_of(l4t: Version) -> JetPack | None:
    """The JetPack among `JETPACKS` whose parts this release has; None for releases that orin-kit is not made for."""
    return next((known for known in JETPACKS if l4t[0] == known.l4t[0] and l4t >= known.l4t), None)


def name_of(l4t: Version) -> str:
    """For people: "JetPack 6.2.1 (L4T R36.4.4)"."""
    known = jetpack_of(l4t)
    name = NAMES.get(l4t) or (f"{known.name} or a later one of its line" if known else "")
    return f"JetPack {name} (L4T R{dotted(l4t)})" if name else f"L4T R{dotted(l4t)}"


def read_board(root: Path) -> str | None:
    """The board's name from the device tree, "NVIDIA Jetson AGX Orin Developer Kit"; containers do not see it."""
    text = read_text(root / DEVICE_TREE_MODEL)
    return text.rstrip("\0\n") if text else None


def read_cuda(root: Path) -> Version | None:
    """The installed CUDA, (12, 6, 11) or just (12, 6).

    From the toolkit's `version.json`; packages installed one by one may lack that, so else from the runtime library's
    file name (`libcudart.so.12.6.68`), of which the first two numbers are CUDA's own.
    """
    home = root / CUDA_HOME
    try:
        return version(json.loads((home / "version.json").read_text("utf-8"))["cuda"]["version"]) or None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    names = [file.name for folder in ("targets/*/lib", "lib64") for file in home.glob(f"{folder}/libcudart.so.*.*.*")]
    return max((version(name.removeprefix("libcudart.so."))[:2] for name in names), default=None)


def read_tensorrt(root: Path) -> Version | None:
    """The TensorRT library's version from its file name, `libnvinfer.so.10.3.0`; None where there is none."""
    for folder in LIBRARY_FOLDERS:
        names = [file.name for file in (root / folder).glob("libnvinfer.so.*.*.*")]
        if names:
            return max(version(name.removeprefix("libnvinfer.so.")) for name in names)
    return None


def read_text(file: Path) -> str | None:
    """The text of a small system file; None where it is missing or cannot be read.

    Sensors that are switched off refuse to be read (EAGAIN), which is no failure of ours.
    """
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return None
