"""Power mode and clocks, and the way back.

nvpmodel and jetson_clocks exist on Jetsons only. The scripts here stand in for them: they keep a mode and clocks in
files, say what the real ones say (as posted by people with Orins) and share their habits: nvpmodel asks before a
reboot, jetson_clocks asks before it overwrites a file and ends with 0 after errors. What the real ones do, only a
Jetson tells.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jetson_root import cpu, write
from orin_kit.doctor import power, sensors
from orin_kit.doctor.power import Board
from orin_kit.errors import OrinKitError, UserError

NVPMODEL = """#!/bin/sh
root={root}
mode=$(sed -n 's/^pmode:0*\\([0-9]\\).*/\\1/p' $root/var/lib/nvpmodel/status)
name() {{ sed -n "s/^< POWER_MODEL ID=$1 NAME=\\(.*\\) >/\\1/p" $root/etc/nvpmodel.conf; }}
case $1 in
    -q) echo "NV Power Mode: $(name $mode)"; echo $mode ;;
    -m)
        if [ -e {root}/broken ]; then echo "NVPM ERROR: Error writing 1 to GPU"; exit 255; fi
        if [ "$2" = 1 ] || [ "$mode" = 1 ]; then
            echo "NVPM WARN: Golden image context is already created"
            echo "NVPM WARN: Reboot required for changing to this power mode: $2"
            echo "NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:"
            read -r answer
            if [ "$answer" != YES ]; then echo "NVPM ERROR: optMask is 1, no request for power mode"; exit 255; fi
            echo "NVPM WARN: rebooting"
        fi
        echo "pmode:000$2 fmode:fanNull" > $root/var/lib/nvpmodel/status ;;
esac
"""
JETSON_CLOCKS = """#!/bin/sh
cpu={root}/sys/devices/system/cpu/cpu0/cpufreq
case $1 in
    --store)
        if [ -e "$2" ]; then
            echo "File $2 already exists. Can I overwrite it? Y/N:"
            read -r answer
            echo "Error: file $2 already exists!"
            exit 1
        fi
        echo inactive > "$HOME/.jetsonclocks_fan.txt"
        if [ ! -e {root}/silent ]; then echo "$cpu/scaling_min_freq:$(cat $cpu/scaling_min_freq)" >> "$2"; fi ;;
    --restore)
        if [ ! -e "$2" ]; then echo "Error: $2 file not found !"; exit 1; fi
        cat "$HOME/.jetsonclocks_fan.txt" > /dev/null || exit 1
        while IFS=: read -r file data; do echo "$data" > "$file"; done < "$2" ;;
    "")
        if [ -e {root}/broken ]; then echo "Error: Failed to max GPU frequency!"; exit 0; fi
        cat $cpu/scaling_max_freq > $cpu/scaling_min_freq ;;
esac
"""
LOWEST, HIGHEST = 729600, 1728000


@pytest.fixture
def board(orin: Path, tmp_path: Path) -> Board:
    """An Orin in mode 2 with free clocks, whose root is whoever runs the tests."""
    write(orin, {"var/lib/nvpmodel/status": "pmode:0002 fmode:fanNull\n", **cpu(0, LOWEST, HIGHEST)})
    made = Board(tmp_path / "nvpmodel", tmp_path / "jetson_clocks", orin, tmp_path / "state", os.geteuid())
    for program, text in ((made.nvpmodel, NVPMODEL), (made.jetson_clocks, JETSON_CLOCKS)):
        program.write_text(text.format(root=orin))
        program.chmod(0o755)
    return made


def now(board: Board) -> tuple[int, int]:
    """Mode and lowest clock."""
    mode = sensors.read_mode(board.root)
    return (mode.id if mode else -1), sensors.read_clocks(board.root)[0].lowest


def change(board: Board, mode: str | None = None, *, clocks: bool = False, reboot: bool = False) -> str:
    return power.set_power(board, mode=mode, clocks=clocks, reboot=reboot)


def test_there_and_back(board: Board) -> None:
    assert change(board, "MAXN", clocks=True) == "power mode MAXN; clocks fixed"
    assert now(board) == (0, HIGHEST)
    assert "before the first change: MODE_30W" in power.show(board)
    assert power.restore(board, reboot=False) == "power mode MODE_30W; clocks as before"
    assert now(board) == (2, LOWEST)
    assert "before the first change" not in power.show(board)


def test_twice_there_is_once_back(board: Board) -> None:
    change(board, "0")
    change(board, "50w", clocks=True)
    change(board, "50W", clocks=True)
    assert now(board) == (3, HIGHEST)
    power.restore(board, reboot=False)
    assert now(board) == (2, LOWEST)
    with pytest.raises(UserError, match="nothing to restore"):
        power.restore(board, reboot=False)


def test_again_after_a_run_that_was_cut_off(board: Board) -> None:
    board.state.mkdir(mode=0o700)
    board.saved_clocks.write_text("half a file")  # the mode was not saved yet, so nothing had changed
    change(board, clocks=True)
    power.restore(board, reboot=False)
    assert now(board) == (2, LOWEST)


def test_a_mode_that_needs_a_reboot_is_left_without_leave(board: Board) -> None:
    with pytest.raises(UserError, match="MODE_15W needs a reboot, and nothing was changed: add --reboot"):
        change(board, "15W", clocks=True)
    assert now(board) == (2, LOWEST)
    assert not board.saved_mode.exists()


def test_a_mode_that_needs_a_reboot_with_leave(board: Board) -> None:
    assert change(board, "15W", reboot=True) == "rebooting into power mode MODE_15W"
    assert now(board)[0] == 1
    with pytest.raises(UserError, match="MODE_30W needs a reboot"):
        power.restore(board, reboot=False)
    assert board.saved_mode.exists()
    power.restore(board, reboot=True)
    assert now(board) == (2, LOWEST)


def test_a_mode_that_there_is_not(board: Board) -> None:
    with pytest.raises(UserError, match="no power mode 40W: choose one of: 0 MAXN, 1 MODE_15W, 2 MODE_30W, 3 MODE_50W"):
        change(board, "40W")
    assert not board.state.exists()


def test_failures_of_the_programs_are_ours_and_said(board: Board) -> None:
    (board.root / "silent").touch()
    with pytest.raises(OrinKitError, match="stored nothing"):
        change(board, "MAXN")
    (board.root / "silent").unlink()
    (board.root / "broken").touch()
    with pytest.raises(OrinKitError, match="stayed in mode MODE_30W: 'NVPM ERROR: Error writing 1 to GPU'"):
        change(board, "MAXN")
    assert not board.saved_mode.exists()
    with pytest.raises(OrinKitError, match="Failed to max GPU frequency"):
        change(board, clocks=True)
    assert now(board) == (2, LOWEST)


def test_a_state_that_others_may_write_is_refused(board: Board) -> None:
    board.state.mkdir()
    board.state.chmod(0o777)  # jetson_clocks --restore would write what they say where they say
    with pytest.raises(UserError, match="others may write"):
        change(board, clocks=True)
    assert now(board) == (2, LOWEST)
    board.state.chmod(0o700)
    change(board, clocks=True)
    board.state.chmod(0o770)
    with pytest.raises(UserError, match="others may write"):
        power.restore(board, reboot=False)
    assert now(board) == (2, HIGHEST)


def test_a_damaged_state_is_told(board: Board) -> None:
    change(board, clocks=True)
    board.saved_mode.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        power.restore(board, reboot=False)


def test_only_root_and_only_on_a_jetson(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.jetson_clocks.unlink()
    with pytest.raises(UserError, match="jetson_clocks is missing: run this on a Jetson"):
        change(board, clocks=True)
    monkeypatch.setattr(os, "geteuid", lambda: board.owner + 1)
    with pytest.raises(UserError, match="needs root: put sudo before"):
        change(board, clocks=True)


def test_show_where_there_is_no_nvpmodel(tmp_path: Path) -> None:
    said = power.show(Board(root=tmp_path, state=tmp_path))
    assert said == "power mode: unknown (of none: no nvpmodel.conf)\nclocks: 0 of 0 fixed"
