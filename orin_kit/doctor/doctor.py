"""`orin-kit doctor`: what an Orin needs to run models, line by line, and what mends what is missing."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, Field, computed_field

from orin_kit.doctor import jetpack, sensors
from orin_kit.doctor.jetpack import JETPACKS, JetPack, dotted
from orin_kit.doctor.probes import ProbeError, run_probe
from orin_kit.engine.plugin_library import PLUGIN_LIBRARY, VARIABLE, find_library
from orin_kit.errors import UserError
from orin_kit.manifest import made_by
from orin_kit.profile.targets import GB

SCHEMA: Final = "orin-kit/doctor/1"
INSTALL = "sudo jetson/install.sh"
POWER = "sudo jetson/power.sh"
ORIN = (8, 7)  # compute capability
NEEDED_MEMORY = (
    2 * GB
)  # a 1.5B model in INT4 with its cache takes about 1.1; the rest is for its process and the system


class Check(BaseModel):
    """One line.

    Attributes:
        needed: without it no engine runs; the others say how fast and how steadily one will.
        ok: nothing to do.
        found: what is there, or why nothing is.
        mend: what to do; empty when ok.
    """

    name: str
    needed: bool
    ok: bool
    found: str
    mend: str


class Report(BaseModel):
    """All checks; `--json` prints this, field by field."""

    schema_: Literal["orin-kit/doctor/1"] = Field(default=SCHEMA, alias="schema")
    orin_kit: str
    checks: list[Check]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """All that is needed is there."""
        return all(check.ok for check in self.checks if check.needed)


class Live(BaseModel):
    """What the running process can reach, beyond files; each is an answer of `probes`, or one line why there is none.

    Attributes:
        python: version of the running interpreter.
        cuda, tensorrt, pycuda, plugins: the GPU by the CUDA driver, TensorRT's Python bindings, pycuda's, and the
            plugin library.
        onnxruntime: its version; None when it is not installed.
    """

    python: tuple[int, ...]
    cuda: dict[str, Any] | str
    tensorrt: dict[str, Any] | str
    pycuda: dict[str, Any] | str
    plugins: dict[str, Any] | str
    onnxruntime: str | None


def doctor(root: str | Path = "/", live: Live | None = None) -> Report:
    """Examine a machine.

    Args:
        root: where its files lie; another directory than `/` examines a copy of a machine's files.
        live: what running things answered; asked of this machine when None.
    """
    root, live = Path(root), live or ask()
    l4t = jetpack.read_l4t(root)
    known = jetpack.jetpack_of(l4t) if l4t else None
    checks = [
        _board(root, live), _jetpack(l4t, known), _python(live, known), _gpu(live), _cuda(root, known),
        _tensorrt(root, live, known), _pycuda(live), _plugins(live), _memory(root), _power_mode(root), _clocks(root),
        _temperature(root), _onnxruntime(live),
    ]  # fmt: skip
    return Report(orin_kit=made_by(), checks=checks)


def ask() -> Live:
    """Try what only trying tells, here and now; takes a second or two."""
    try:
        onnxruntime: str | None = metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        onnxruntime = None
    return Live(
        python=sys.version_info[:3],
        cuda=_try("cuda"),
        tensorrt=_try("module", "tensorrt"),
        pycuda=_try("module", "pycuda.driver"),
        plugins=_try_plugins(),
        onnxruntime=onnxruntime,
    )


def _try_plugins() -> dict[str, Any] | str:
    try:
        path = find_library(None)
    except UserError as error:
        return error.what
    return _try("plugins", str(path)) if path else f"no {PLUGIN_LIBRARY} here"


def _try(name: str, *arguments: str) -> dict[str, Any] | str:
    try:
        return run_probe(name, *arguments)
    except ProbeError as error:
        return str(error)


def _check(name: str, ok: bool, found: str, mend: str, *, needed: bool = True) -> Check:
    return Check(name=name, needed=needed, ok=ok, found=found, mend="" if ok else mend)


def _board(root: Path, live: Live) -> Check:
    board = jetpack.read_board(root)
    orin = isinstance(live.cuda, dict) and tuple(live.cuda["capability"]) == ORIN
    if board is None:
        architecture = platform.machine()
        found = "an Orin's GPU; a container hides the board's name" if orin else f"no Jetson ({architecture})"
    else:
        found = board
    return _check("board", orin or "Orin" in (board or ""), found, "run this on a Jetson AGX Orin; models are made on "
                  "any machine and copied there")  # fmt: skip


def _jetpack(l4t: jetpack.Version | None, known: JetPack | None) -> Check:
    supported = " or ".join(each.name for each in JETPACKS)
    if l4t is None:
        mend = f"flash JetPack {supported}; in a container, mount /{jetpack.TEGRA_RELEASE}"
        return _check("jetpack", False, f"no /{jetpack.TEGRA_RELEASE}", mend)
    return _check("jetpack", known is not None, jetpack.name_of(l4t), f"orin-kit is made for JetPack {supported}")


def _python(live: Live, known: JetPack | None) -> Check:
    ok = known is None or live.python[:2] == known.python
    wanted = dotted(known.python) if known else ""
    mend = f"TensorRT's bindings are for the system's Python {wanted}: make the environment with it ({INSTALL} does)"
    return _check("python", ok, dotted(live.python), mend)


def _gpu(live: Live) -> Check:
    if isinstance(live.cuda, str):
        mend = "add the user to the groups video and render, or start the container with --runtime nvidia or --gpus all"
        return _check("gpu", False, f"none that CUDA can use: {live.cuda}", mend)
    answer = live.cuda
    found = f"{answer['name']}, sm_{''.join(map(str, answer['capability']))}, driver for CUDA {dotted(answer['cuda'])}"
    return _check("gpu", True, found, "")


def _cuda(root: Path, known: JetPack | None) -> Check:
    found = jetpack.read_cuda(root)
    if found is None:
        return _check("cuda", False, f"none in /{jetpack.CUDA_HOME}", INSTALL)
    ok = known is None or found[:2] == known.cuda
    mend = f"JetPack {known.name} has CUDA {dotted(known.cuda)}: {INSTALL}" if known else ""
    return _check("cuda", ok, f"CUDA {dotted(found)}", mend)


def _tensorrt(root: Path, live: Live, known: JetPack | None) -> Check:
    library = jetpack.read_tensorrt(root)
    bound = jetpack.version(live.tensorrt["version"]) if isinstance(live.tensorrt, dict) else None
    said = f"library {dotted(library)}" if library else "no library"
    said += f", bindings {dotted(bound)}" if bound else f", no Python bindings ({live.tensorrt})"
    if bound is None or (known and library is None):
        mend = f"{INSTALL}; the environment must see the system's packages (venv --system-site-packages)"
        return _check("tensorrt", False, said, mend)
    if library and library[:3] != bound[:3]:  # an engine opens only with the version that built it
        return _check("tensorrt", False, said, "pip uninstall tensorrt: the bindings must be the system's own")
    ok = known is None or bound[:2] == known.tensorrt
    mend = f"JetPack {known.name} has TensorRT {dotted(known.tensorrt)}: {INSTALL}" if known else ""
    return _check("tensorrt", ok, said, mend)


def _pycuda(live: Live) -> Check:
    ok = isinstance(live.pycuda, dict)
    return _check("pycuda", ok, "loads" if ok else str(live.pycuda), f"{INSTALL}, which builds it for JetPack's CUDA")


def _plugins(live: Live) -> Check:
    if isinstance(live.plugins, str):
        mend = f"build them: {INSTALL}; or say where they are in {VARIABLE}"
        return _check("plugins", False, live.plugins, mend)
    sms = live.plugins["sms"]
    found = f"{live.plugins['path']} {live.plugins['version']} for {', '.join(sms)}"
    sm = f"sm_{''.join(map(str, live.cuda['capability']))}" if isinstance(live.cuda, dict) else None
    mend = f"this GPU is {sm}: build jetson/plugins with -DCMAKE_CUDA_ARCHITECTURES={str(sm)[3:]}"
    return _check("plugins", sm is None or sm in sms, found, mend)


def _memory(root: Path) -> Check:
    memory = sensors.read_memory(root)
    if memory is None:
        return _check("memory", False, f"no /{sensors.MEMINFO}", "run this on Linux")
    found = f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB available, {memory.swap / GB:.1f} GB swap"
    mend = f"free some: {NEEDED_MEMORY / GB:g} GB are needed; `sudo systemctl isolate multi-user` ends the desktop"
    return _check("memory", memory.available >= NEEDED_MEMORY, found, mend)


def _power_mode(root: Path) -> Check:
    mode = sensors.read_mode(root)
    if mode is None:
        return _check("power mode", False, "unknown: no nvpmodel here", "only a Jetson has power modes", needed=False)
    fastest = next((m for m in sensors.read_modes(root).modes if m.name.startswith("MAXN")), mode)
    mend = f"slower than it can be: {POWER} set --mode {fastest.name}"
    return _check("power mode", mode == fastest, f"{mode.name} (mode {mode.id})", mend, needed=False)


def _clocks(root: Path) -> Check:
    clocks = sensors.read_clocks(root)
    moving = [clock.name for clock in clocks if not clock.fixed]
    if not clocks:
        found, mend = "unknown: Linux governs none here", "figures of this machine may vary with its clocks"
    else:
        found = f"{', '.join(_runs(moving))} vary with the load" if moving else "fixed at their highest"
        mend = f"before measuring: {POWER} set --clocks"
    return _check("clocks", bool(clocks) and not moving, found, mend, needed=False)


def _runs(names: list[str]) -> Iterator[str]:
    """["cpu0", "cpu1", "17000000.gpu"] -> "2 CPUs", "17000000.gpu"."""
    cpus = [name for name in names if name.startswith("cpu")]
    if cpus:
        yield f"{len(cpus)} CPU{'s' * (len(cpus) > 1)}"
    yield from (name for name in names if name not in cpus)


def _temperature(root: Path) -> Check:
    thermal = sensors.read_thermal(root)
    hottest = thermal.hottest
    if hottest is None:
        mend = "heat cannot be told from slowness on this machine"
        return _check("temperature", False, "unknown: no thermal zone can be read", mend, needed=False)
    found = f"hottest {hottest.name} {hottest.celsius:.1f} °C"
    if hottest.slows_at is not None:
        found += f", slows at {hottest.slows_at:.1f}"
    slowed = [*thermal.alerts, *(zone.name for zone in thermal.beyond)]
    if slowed:
        found += f"; slowed now: {', '.join(slowed)}"
    return _check("temperature", not slowed, found, "let it cool, and clear the fan and the air's way", needed=False)


def _onnxruntime(live: Live) -> Check:
    found = live.onnxruntime or "not installed"
    mend = "to run ONNX artifacts too: pip install onnxruntime"
    return _check("onnxruntime", live.onnxruntime is not None, found, mend, needed=False)
