"""Power mode, clocks, heat and memory, from trees of files as L4T has them; and this machine's, where it has them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from jetson_root import NVPMODEL_CONF, cooling_device, cpu, gpu, thermal_zone, write
from orin_kit.doctor import sensors
from orin_kit.doctor.sensors import Clock, Mode, Zone

MODES = [(0, "MAXN"), (1, "MODE_15W"), (2, "MODE_30W"), (3, "MODE_50W")]


def test_modes_but_not_those_of_the_comments() -> None:
    found = sensors.parse_modes(NVPMODEL_CONF)
    assert [(mode.id, mode.name) for mode in found.modes] == MODES
    assert found.default == 2


@pytest.mark.parametrize(
    ("wanted", "id_"), [("0", 0), ("MAXN", 0), ("maxn", 0), ("30W", 2), ("mode_30w", 2), ("3", 3), ("00", None),
                        ("40W", None), ("", None)]
)  # fmt: skip
def test_a_mode_by_number_or_name(wanted: str, id_: int | None) -> None:
    mode = sensors.parse_modes(NVPMODEL_CONF).find(wanted)
    assert (mode.id if mode else None) == id_


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ("NV Power Mode: MODE_30W\n2\n", Mode(2, "MODE_30W")),
        ("NV Fan Mode:quiet\nNV Power Mode: MAXN\n0\n", Mode(0, "MAXN")),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN_SUPER\n2", Mode(2, "MAXN_SUPER")),
        ("NVPM ERROR: failed to read PARAM", None),
        ("", None),
    ],
)
def test_what_nvpmodel_says(said: str, mode: Mode | None) -> None:
    assert sensors.parse_query(said) == mode


def test_the_mode_noted_last_else_the_default(orin: Path) -> None:
    status = orin / "var/lib/nvpmodel/status"
    assert sensors.read_mode(orin) == Mode(0, "MAXN")
    status.write_text("pmode:0003 fmode:fanNull")
    assert sensors.read_mode(orin) == Mode(3, "MODE_50W")
    status.write_text("pmode:0009\n")
    assert sensors.read_mode(orin) is None
    status.unlink()
    assert sensors.read_mode(orin) == Mode(2, "MODE_30W")
    (orin / "etc/nvpmodel.conf").unlink()
    assert sensors.read_mode(orin) is None


def test_clocks_of_what_is_on(orin: Path) -> None:
    write(orin, {**cpu(1, 729600, 1728000), **gpu(306000000, 612000000)})
    write(orin, {"sys/class/devfreq/15340000.vic/min_freq": "1\n", "sys/class/devfreq/15340000.vic/max_freq": "2\n"})
    clocks = sensors.read_clocks(orin)
    assert clocks == [
        Clock("cpu0", 2201600, 2201600), Clock("cpu1", 729600, 1728000), Clock("17000000.gpu", 306000000, 612000000)
    ]  # fmt: skip
    assert [clock.fixed for clock in clocks] == [True, False, False]


def test_heat(orin: Path) -> None:
    thermal = sensors.read_thermal(orin)
    assert [zone.name for zone in thermal.zones] == ["cpu-thermal", "gpu-thermal", "tj-thermal"]
    assert thermal.zones[0] == Zone("cpu-thermal", 47.312, 99.0)  # the fan's trip point at 51 slows nothing
    assert thermal.hottest == Zone("tj-thermal", 48.593, None)
    assert thermal.alerts == []
    assert thermal.beyond == []


def test_throttling_by_alert_and_by_trip_point(orin: Path) -> None:
    write(orin, {**cooling_device(9, "gpu-throttle-alert", 1), **cooling_device(7, "pwm-fan", 3)})
    assert sensors.read_thermal(orin).alerts == ["gpu-throttle-alert"]
    write(orin, thermal_zone(1, "gpu-thermal", "99000\n", {"passive": 99000, "critical": 104500}))
    assert [zone.name for zone in sensors.read_thermal(orin).beyond] == ["gpu-thermal"]


def test_a_zone_that_cannot_be_read_is_left_out(orin: Path) -> None:
    write(orin, thermal_zone(1, "gpu-thermal", "", {"passive": 99000}))
    (orin / "sys/class/thermal/thermal_zone8/temp").unlink()
    (orin / "sys/class/thermal/thermal_zone8/temp").mkdir()  # reading it is an OSError, as EAGAIN is on a Jetson
    assert [zone.name for zone in sensors.read_thermal(orin).zones] == ["cpu-thermal"]


def test_trip_points_left_unset_slow_nothing(orin: Path) -> None:
    write(orin, thermal_zone(1, "gpu-thermal", "44000\n", {"passive": 0, "hot": -274000, "critical": 104500}))
    assert sensors.read_thermal(orin).zones[1].slows_at == 104.5


def test_memory(orin: Path) -> None:
    memory = sensors.read_memory(orin)
    assert memory == sensors.Memory(64336988 * 1024, 60012345 * 1024, 32168480 * 1024)


def test_memory_of_this_machine_as_psutil_reads_it() -> None:
    memory = sensors.read_memory(Path("/"))
    assert memory is not None
    assert memory.total == psutil.virtual_memory().total
    assert memory.available == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_clocks_of_this_machine_as_psutil_counts_them() -> None:
    clocks = sensors.read_clocks(Path("/"))
    cpus = [clock for clock in clocks if clock.name.startswith("cpu")]
    assert len(cpus) in (0, psutil.cpu_count(), len(os.sched_getaffinity(0)))
    assert all(clock.lowest <= clock.highest for clock in clocks)


def test_nothing_where_nothing_is(tmp_path: Path) -> None:
    assert sensors.read_memory(tmp_path) is None
    assert sensors.read_clocks(tmp_path) == []
    assert sensors.read_thermal(tmp_path).hottest is None
    assert sensors.read_modes(tmp_path).modes == ()
