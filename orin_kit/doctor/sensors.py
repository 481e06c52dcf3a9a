"""Power mode, clocks, temperatures and memory, from the files that Linux and L4T keep; nothing needs root.

Sources: the kernel's sysfs-class-thermal, cpufreq and devfreq; NVIDIA's nvpmodel.conf, which describes its own format.
Everything is read below a root directory, so that a copied tree can be examined as well as `/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from orin_kit.doctor.jetpack import read_text

NVPMODEL_CONF = "etc/nvpmodel.conf"
NVPMODEL_STATUS = "var/lib/nvpmodel/status"
THERMAL = "sys/class/thermal"
CPUS = "sys/devices/system/cpu"
DEVFREQ = "sys/class/devfreq"
MEMINFO = "proc/meminfo"
# Cooling devices that L4T switches on when it holds the clocks back.
ALERTS = ("-throttle-alert", "hot-surface-alert")
SLOWING_TRIPS = ("passive", "hot", "critical")  # "active" is the fan


@dataclass(frozen=True)
class Mode:
    """A power mode of nvpmodel."""

    id: int
    name: str


@dataclass(frozen=True)
class Modes:
    """All power modes of a board, in the order of `nvpmodel.conf`, and the one it boots with the first time."""

    modes: tuple[Mode, ...]
    default: int | None

    def find(self, wanted: str) -> Mode | None:
        """By number ("0") or name ("MAXN", "30W" for "MODE_30W"); None when there is no such mode."""
        names = (wanted.upper(), f"MODE_{wanted.upper()}")
        return next((m for m in self.modes if wanted == str(m.id) or m.name.upper() in names), None)


def parse_modes(text: str) -> Modes:
    """The modes in `/etc/nvpmodel.conf`: lines "< POWER_MODEL ID=0 NAME=MAXN >" and "< PM_CONFIG DEFAULT=2 >"."""
    found = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\w+)\s*>", text, re.MULTILINE)
    default = re.search(r"^\s*<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>", text, re.MULTILINE)
    return Modes(tuple(Mode(int(id_), name) for id_, name in found), int(default[1]) if default else None)


def parse_query(text: str) -> Mode | None:
    """What `nvpmodel -q` prints: warnings perhaps, then "NV Power Mode: MODE_30W" and the number on the next line."""
    found = re.search(r"^NV Power Mode:\s*(\w+)\s*\n\s*(\d+)\s*$", text, re.MULTILINE)
    return Mode(int(found[2]), found[1]) if found else None


def read_modes(root: Path) -> Modes:
    return parse_modes(read_text(root / NVPMODEL_CONF) or "")


def read_mode(root: Path) -> Mode | None:
    """The power mode that nvpmodel noted last ("pmode:0002 fmode:fanNull"); before its first note, the default.

    None where there is no nvpmodel, or its two files disagree.
    """
    modes = read_modes(root)
    noted = re.search(r"pmode:(\d+)", read_text(root / NVPMODEL_STATUS) or "")
    current = int(noted[1]) if noted else modes.default
    return next((mode for mode in modes.modes if mode.id == current), None)


@dataclass(frozen=True)
class Clock:
    """Limits within which a governor may choose; fixed when they are equal. CPUs in kHz, the GPU in Hz."""

    name: str
    lowest: int
    highest: int

    @property
    def fixed(self) -> bool:
        return self.lowest == self.highest


def read_clocks(root: Path) -> list[Clock]:
    """Of the CPUs that are on and of the GPU; the memory's needs root to be read. Empty where Linux governs none."""
    clocks: list[Clock] = []
    for folder in sorted((root / CPUS).glob("cpu[0-9]*"), key=lambda cpu: int(cpu.name[3:])):
        online = read_text(folder / "online")  # the first CPU of many machines cannot be switched off and has none
        if online is None or online.strip() == "1":
            _add_clock(clocks, folder.name, folder / "cpufreq/scaling_min_freq", folder / "cpufreq/scaling_max_freq")
    for folder in sorted((root / DEVFREQ).glob("*")):
        if folder.name.endswith(".gpu") or folder.name.startswith(
            "gpu-gpc"
        ):  # nvgpu's name; that of NVIDIA's open driver
            _add_clock(clocks, folder.name, folder / "min_freq", folder / "max_freq")
    return clocks


def _add_clock(clocks: list[Clock], name: str, lowest: Path, highest: Path) -> None:
    limits = _number(lowest), _number(highest)
    if limits[0] is not None and limits[1] is not None:
        clocks.append(Clock(name, limits[0], limits[1]))


@dataclass(frozen=True)
class Zone:
    """A thermal zone.

    Attributes:
        name: "gpu-thermal", "tj-thermal" (the hottest junction), ...
        celsius: now.
        slows_at: degrees of its lowest trip point that slows or stops the machine; None when it has none.
    """

    name: str
    celsius: float
    slows_at: float | None


@dataclass(frozen=True)
class Thermal:
    """All zones that can be read, and the alerts that hold clocks back now ("gpu-throttle-alert")."""

    zones: list[Zone] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)

    @property
    def hottest(self) -> Zone | None:
        return max(self.zones, key=lambda zone: zone.celsius, default=None)

    @property
    def beyond(self) -> list[Zone]:
        """Zones at or above the point where they slow the machine."""
        return [zone for zone in self.zones if zone.slows_at is not None and zone.celsius >= zone.slows_at]


def read_thermal(root: Path) -> Thermal:
    """Zones of units that are switched off cannot be read, and are left out."""
    zones, alerts = [], []
    for folder in sorted((root / THERMAL).glob("thermal_zone*"), key=lambda zone: int(zone.name[12:])):
        temperature = _number(folder / "temp")
        if temperature is not None:
            name = (read_text(folder / "type") or folder.name).strip()
            zones.append(Zone(name, temperature / 1000, _slows_at(folder)))
    for folder in sorted((root / THERMAL).glob("cooling_device*")):
        name = (read_text(folder / "type") or "").strip()
        if name.endswith(ALERTS) and (_number(folder / "cur_state") or 0) > 0:
            alerts.append(name)
    return Thermal(zones, sorted(alerts))


def _slows_at(zone: Path) -> float | None:
    degrees = []
    for kind in zone.glob("trip_point_*_type"):
        at = _number(kind.with_name(kind.name.replace("_type", "_temp")))
        # A trip at or below 0 is one that the firmware left unset.
        if at is not None and at > 0 and (read_text(kind) or "").strip() in SLOWING_TRIPS:
            degrees.append(at / 1000)
    return min(degrees, default=None)


@dataclass(frozen=True)
class Memory:
    """Bytes; `available` is what a new process may take without swapping (the kernel's own estimate)."""

    total: int
    available: int
    swap: int


def read_memory(root: Path) -> Memory | None:
    """From `/proc/meminfo`, whose "kB" are 1,024 bytes. CPU and GPU of a Jetson share it."""
    text = read_text(root / MEMINFO) or ""
    values = {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    if "MemTotal" not in values or "MemAvailable" not in values:
        return None
    return Memory(values["MemTotal"], values["MemAvailable"], values.get("SwapTotal", 0))


def _number(file: Path) -> int | None:
    try:
        return int(read_text(file) or "")
    except ValueError:
        return None
