"""The shell parts of jetson/: what `install.sh --check` says of a copied tree, and files that other programs check."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jetson_root import R36, R39, write
from orin_kit.doctor import jetpack
from orin_kit.engine.plugin_library import PLUGIN_LIBRARY

JETSON = Path(__file__).parents[2] / "jetson"
INSTALL = JETSON / "install.sh"
VERSION = re.findall(r'^version = "(.*)"', (JETSON.parent / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[0]
PACKAGES = {
    "6.2": ("12-6", "10.3.0.30-1+cuda12.5"),
    "7.2": ("13-2", "10.16.2.10-1+cuda13.2"),
}
PLAIN = ("build-essential", "cmake", "python3-venv", "python3-dev")
CUDA = ("cuda-nvcc", "cuda-cudart-dev", "cuda-driver-dev", "cuda-profiler-api", "libcurand-dev")
PINNED = (
    "libnvinfer10", "libnvinfer-plugin10", "libnvonnxparsers10", "libnvinfer-dev", "libnvinfer-headers-plugin-dev",
    "libnvinfer-plugin-dev", "libnvonnxparsers-dev", "libnvinfer-bin", "python3-libnvinfer",
)  # fmt: skip

needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-query"), reason="no dpkg here")


def check(root: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines and complaints of `install.sh --check`."""
    command = ["bash", str(INSTALL), "--check", "--root", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr


def package(name: str, version: str, status: str = "install ok installed") -> str:
    return f"Package: {name}\nStatus: {status}\nArchitecture: arm64\nVersion: {version}\nDescription: x\n\n"


def packages(jetpack_name: str) -> str:
    """A dpkg status file with all that the script asks for."""
    cuda, tensorrt = PACKAGES[jetpack_name]
    names = [*PLAIN, *(f"{name}-{cuda}" for name in CUDA)]
    return "".join([package(name, "1.0-1") for name in names] + [package(name, tensorrt) for name in PINNED])


def whole(root: Path, jetpack_name: str = "6.2") -> Path:
    """A Jetson on which the script has done its work."""
    unit = (JETSON / "orin-kit.service").read_text("utf-8")
    write(root, {
        "etc/nv_tegra_release": {"6.2": R36, "7.2": R39}[jetpack_name],
        "var/lib/dpkg/status": packages(jetpack_name),
        "opt/orin-kit/pyvenv.cfg": "home = /usr/bin\ninclude-system-site-packages = true\nversion = 3.10.12\n",
        "opt/orin-kit/bin/python": "",
        f"opt/orin-kit/lib/python3.10/site-packages/orin_kit-{VERSION}.dist-info/METADATA": "",
        "opt/orin-kit/lib/python3.10/site-packages/pycuda-2025.1.2.dist-info/METADATA": "",
        f"opt/orin-kit/lib/{PLUGIN_LIBRARY}": "",
        "etc/systemd/system/orin-kit.service": unit,
    })  # fmt: skip
    (root / "opt/orin-kit/bin/python").chmod(0o755)
    return root


@needs_dpkg
@pytest.mark.parametrize("jetpack_name", ["6.2", "7.2"])
def test_nothing_to_do_where_all_is_done(tmp_path: Path, jetpack_name: str) -> None:
    code, lines, complaints = check(whole(tmp_path, jetpack_name))
    assert (code, complaints) == (0, "")
    assert lines[0] == f"ok    JetPack {jetpack_name}"
    assert len(lines) == 6
    assert all(line.startswith("ok    ") for line in lines)


@needs_dpkg
def test_a_fresh_jetson_has_all_to_do_and_nothing_is_touched(tmp_path: Path) -> None:
    write(tmp_path, {"etc/nv_tegra_release": R36, "var/lib/dpkg/status": ""})
    before = sorted(tmp_path.rglob("*"))
    code, lines, _ = check(tmp_path)
    assert code == 1
    assert [line.split()[0] for line in lines] == ["ok", "todo", "todo", "todo", "todo", "todo"]
    assert "cuda-nvcc-12-6" in lines[1]
    assert "python3-libnvinfer=10.3.*" in lines[1]
    assert sorted(tmp_path.rglob("*")) == before


@needs_dpkg
@pytest.mark.parametrize(
    ("name", "text", "todo"),
    [
        ("cmake", "", "cmake"),
        ("cmake", package("cmake", "1.0-1", "deinstall ok config-files"), "cmake"),
        ("libnvinfer10", package("libnvinfer10", "10.7.0.23-1+cuda12.6"), "libnvinfer10=10.3.*"),
        ("libnvinfer10", package("libnvinfer10", "10.30.0.1-1+cuda12.6"), "libnvinfer10=10.3.*"),
    ],
)
def test_a_package_that_is_missing_removed_or_of_another_version(
    tmp_path: Path, name: str, text: str, todo: str
) -> None:
    status = packages("6.2")
    there = next(entry for entry in status.split("\n\n") if entry.startswith(f"Package: {name}\n"))
    write(whole(tmp_path), {"var/lib/dpkg/status": status.replace(f"{there}\n\n", text)})
    code, lines, _ = check(tmp_path)
    assert code == 1
    assert [line for line in lines if line.startswith("todo")] == [f"todo  system packages: {todo}"]


@needs_dpkg
@pytest.mark.parametrize(
    ("path", "text", "todo"),
    [
        ("opt/orin-kit/pyvenv.cfg", "include-system-site-packages = false\n", "Python environment"),
        (f"opt/orin-kit/lib/{PLUGIN_LIBRARY}", None, "TensorRT plugins"),
        ("opt/orin-kit/lib/python3.10/site-packages/pycuda-2025.1.2.dist-info", None, "orin-kit in"),
        (f"opt/orin-kit/lib/python3.10/site-packages/orin_kit-{VERSION}.dist-info", None, "orin-kit in"),
        ("etc/systemd/system/orin-kit.service", "[Unit]\n", "systemd unit"),
    ],
)
def test_a_step_that_is_undone(tmp_path: Path, path: str, text: str | None, todo: str) -> None:
    whole(tmp_path)
    if text is None:
        shutil.move(tmp_path / path, tmp_path / "gone")
    else:
        (tmp_path / path).write_text(text)
    code, lines, _ = check(tmp_path)
    assert code == 1
    assert [line[6:].startswith(todo) for line in lines if line.startswith("todo")] == [True]


@needs_dpkg
@pytest.mark.parametrize(
    "release",
    [(36, 3), (36, 4), (36, 4, 2), (36, 4, 3), (36, 4, 7), (36, 5), (36, 10), (35, 6, 1), (38, 2), (38, 4),
     (39, 0), (39, 2), (39, 2, 1), (39, 3), (40, 0)],
)  # fmt: skip
def test_the_script_and_the_doctor_agree_on_releases(tmp_path: Path, release: tuple[int, ...]) -> None:
    revision = ".".join(str(part) for part in (*release[1:], 0)[:2])
    line = f"# R{release[0]} (release), REVISION: {revision}, GCID: 1, BOARD: generic, EABI: aarch64\n"
    write(tmp_path, {"etc/nv_tegra_release": line, "var/lib/dpkg/status": ""})
    code, lines, complaints = check(tmp_path)
    known = jetpack.jetpack_of(jetpack.read_l4t(tmp_path) or ())
    if known:
        assert lines[0] == f"ok    JetPack {known.name}"
    else:
        assert code == 2
        assert "is neither JetPack 6.2 nor 7.2" in complaints


def test_the_scripts_versions_are_the_doctors() -> None:
    text = INSTALL.read_text("utf-8")
    for known in jetpack.JETPACKS:
        cuda, tensorrt = "-".join(map(str, known.cuda)), jetpack.dotted(known.tensorrt)
        assert f"{known.name}) cuda={cuda} tensorrt={tensorrt} ;;" in text
    assert PLUGIN_LIBRARY in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--check", "--root", "/nowhere"], "this is no Jetson"),
        (["--check", "--jetpack", "5.1"], "JetPack 5.1 is not one of 6.2 and 7.2"),
        (["--root", "/tmp"], "--root goes with --check only"),
        (["--prefix"], "--prefix needs a value"),
        (["--chekc"], "unknown option --chekc"),
    ],
)
def test_what_the_script_refuses(arguments: list[str], complaint: str) -> None:
    done = subprocess.run(["bash", str(INSTALL), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_release_file_cannot_run_commands(tmp_path: Path) -> None:
    line = "# R36 (release), REVISION: 4.3$(touch ran), `touch ran`; touch ran\n"
    write(tmp_path, {"etc/nv_tegra_release": line, "var/lib/dpkg/status": ""})
    subprocess.run(["bash", str(INSTALL), "--check", "--root", "."], cwd=tmp_path, check=False, capture_output=True)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("script", ["install.sh", "power.sh"])
def test_scripts_are_sound(script: str) -> None:
    assert (JETSON / script).stat().st_mode & 0o111 == 0o111
    subprocess.run(["bash", "-n", str(JETSON / script)], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(JETSON / script)], check=True)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_the_unit_is_sound(tmp_path: Path) -> None:
    unit = (JETSON / "orin-kit.service").read_text("utf-8")
    assert "/opt/orin-kit/bin/orin-kit serve" in unit
    (tmp_path / "orin-kit.service").write_text(unit.replace("/opt/orin-kit/bin/orin-kit", "/bin/true"))
    command = ["systemd-analyze", "verify", str(tmp_path / "orin-kit.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "orin-kit.service" in line] == []


def test_the_image_copies_what_is_there() -> None:
    text = (JETSON / "Dockerfile").read_text("utf-8")
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (JETSON.parent / source).exists(), source
    bases = re.findall(r"^FROM \S+ AS jetpack-(\S+)$", text, re.MULTILINE)
    assert bases == [known.name for known in jetpack.JETPACKS]
