"""Which JetPack a machine has, from the texts that NVIDIA leaves on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orin_kit.doctor import jetpack


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", (36, 4, 3)),
        ("# R36 (release), REVISION: 5.0, GCID: 43688277, BOARD: generic, EABI: aarch64", (36, 5)),
        ("# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64", (39, 2)),
        ("# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64", (39, 2, 1)),
        ("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64", (35, 4, 1)),
        ("", None),
        ("something else", None),
        ("# KERNEL_VARIANT: oot", None),
    ],
)
def test_releases(line: str, release: tuple[int, ...] | None) -> None:
    assert jetpack.parse_l4t(line) == release


@pytest.mark.parametrize(
    ("release", "known", "name"),
    [
        ((36, 4, 3), "6.2", "JetPack 6.2 (L4T R36.4.3)"),
        ((36, 5), "6.2", "JetPack 6.2.2 (L4T R36.5)"),
        ((36, 6), "6.2", "JetPack 6.2 or a later one of its line (L4T R36.6)"),
        ((39, 2), "7.2", "JetPack 7.2 (L4T R39.2)"),
        ((39, 2, 1), "7.2", "JetPack 7.2.1 (L4T R39.2.1)"),
        ((36, 4), None, "JetPack 6.1 (L4T R36.4)"),
        ((38, 2), None, "JetPack 7.0 (L4T R38.2)"),
        ((35, 4, 1), None, "L4T R35.4.1"),
        ((40, 1), None, "L4T R40.1"),
    ],
)
def test_what_orin_kit_is_made_for(release: tuple[int, ...], known: str | None, name: str) -> None:
    found = jetpack.jetpack_of(release)
    assert (found.name if found else None) == known
    assert jetpack.name_of(release) == name


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.3.0.30-1+cuda12.5", (10, 3, 0, 30)), ("13.2.2", (13, 2, 2)), ("7.2-b187", (7, 2)), ("", ()), ("b1", ())],
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert jetpack.version(text) == numbers


def test_cuda_by_its_own_file(orin: Path) -> None:
    assert jetpack.read_cuda(orin) == (12, 6, 11)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cuda": {}}', '{"cuda": {"version": 12}}'])
def test_cuda_by_its_library_where_that_file_says_nothing(orin: Path, text: str) -> None:
    (orin / "usr/local/cuda/version.json").write_text(text)
    assert jetpack.read_cuda(orin) is None
    folder = orin / "usr/local/cuda/targets/sbsa-linux/lib"
    folder.mkdir(parents=True)
    (folder / "libcudart.so.13.2.86").touch()
    assert jetpack.read_cuda(orin) == (13, 2)


def test_tensorrt_by_its_library(orin: Path) -> None:
    folder = orin / "usr/lib/aarch64-linux-gnu"
    (folder / "libnvinfer.so.10").touch()
    (folder / "libnvinfer_plugin.so.10.9.9").touch()
    assert jetpack.read_tensorrt(orin) == (10, 3, 0)
    (folder / "libnvinfer.so.10.16.2").touch()  # the larger number, not the larger text
    assert jetpack.read_tensorrt(orin) == (10, 16, 2)


def test_nothing_where_nothing_is(tmp_path: Path) -> None:
    assert jetpack.read_l4t(tmp_path) is None
    assert jetpack.read_board(tmp_path) is None
    assert jetpack.read_cuda(tmp_path) is None
    assert jetpack.read_tensorrt(tmp_path) is None
