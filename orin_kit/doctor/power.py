"""Power mode and fixed clocks for measuring, with the way back: `jetson/power.sh` runs this as root.

nvpmodel chooses how much power the board may draw, jetson_clocks pins the clocks at what that mode allows. What was set
before the first change is kept until `restore`, so setting twice still leads back to the start. Both are NVIDIA's
programs; neither has a library, and jetson_clocks ends with 0 whatever happened, so their words are read as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from orin_kit.doctor import sensors
from orin_kit.doctor.sensors import Mode
from orin_kit.errors import OrinKitError, UserError

TIMEOUT_S = 60.0
REBOOT_NEEDED = "Reboot required"  # nvpmodel, before it asks "DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:"


@dataclass(frozen=True)
class Board:
    """Where a board's programs and files lie; the defaults are L4T's.

    Attributes:
        state: a folder that only root may write: jetson_clocks writes what its file says to where it says.
        owner: user number that must run this and own `state`: root's.
    """

    nvpmodel: Path = Path("/usr/sbin/nvpmodel")
    jetson_clocks: Path = Path("/usr/bin/jetson_clocks")
    root: Path = Path("/")
    state: Path = Path("/var/lib/orin-kit-power")
    owner: int = 0

    @property
    def saved_mode(self) -> Path:
        return self.state / "mode.json"

    @property
    def saved_clocks(self) -> Path:
        return self.state / "clocks.conf"


def show(board: Board) -> str:
    """The mode, its alternatives, the clocks, and whether something is to be restored."""
    mode = sensors.read_mode(board.root)
    names = ", ".join(f"{m.id} {m.name}" for m in sensors.read_modes(board.root).modes) or "none: no nvpmodel.conf"
    clocks = sensors.read_clocks(board.root)
    fixed = sum(clock.fixed for clock in clocks)
    lines = [
        f"power mode: {f'{mode.id} {mode.name}' if mode else 'unknown'} (of {names})",
        f"clocks: {fixed} of {len(clocks)} fixed",
    ]
    if board.saved_mode.is_file():
        lines.append(f"before the first change: {_saved(board).name}; `restore` leads back to it")
    return "\n".join(lines)


def set_power(board: Board, *, mode: str | None, clocks: bool, reboot: bool) -> str:
    """Choose a power mode, pin the clocks, or both.

    Args:
        board: whose.
        mode: number or name; None leaves it.
        clocks: pin CPU, GPU and memory clocks at their highest.
        reboot: let nvpmodel reboot at once where the mode needs that.

    Returns:
        What was done.

    Raises:
        UserError: not root, no such mode, or a reboot is needed.
        OrinKitError: NVIDIA's programs failed.
    """
    _require(board)
    current, wanted = _query(board), None
    if mode is not None:
        modes = sensors.read_modes(board.root)
        wanted = modes.find(mode)
        if wanted is None:
            names = ", ".join(f"{m.id} {m.name}" for m in modes.modes)
            raise UserError(f"this board has no power mode {mode}", mend=f"choose one of: {names}")
    fresh = not board.saved_mode.is_file()
    if fresh:
        _save(board, current)
    done = []
    if wanted:
        try:
            done.append(_change_mode(board, current, wanted, reboot))
        except OrinKitError:
            if fresh:
                _forget(board)  # nothing was changed
            raise
    if clocks:
        _run([str(board.jetson_clocks)], board)
        done.append("clocks fixed")
    return "; ".join(done)


def restore(board: Board, *, reboot: bool) -> str:
    """Lead back to what was set before the first change.

    The mode first: the saved clocks are those of the saved mode. Where the mode needs a reboot, the clocks are free
    again after it, and a second `restore` finds the mode right and ends the matter.

    Raises:
        UserError: not root, nothing saved, or a reboot is needed.
        OrinKitError: NVIDIA's programs failed.
    """
    _require(board)
    if not board.saved_mode.is_file():
        raise UserError("there is nothing to restore", mend="nothing was changed since the last restore")
    saved = _saved(board)
    said = _change_mode(board, _query(board), saved, reboot)
    _run([str(board.jetson_clocks), "--restore", str(board.saved_clocks)], board)
    _forget(board)
    return f"{said}; clocks as before"


def _require(board: Board) -> None:
    if os.geteuid() != board.owner:
        raise UserError("changing power needs root", mend="put sudo before the command")
    for program in (board.nvpmodel, board.jetson_clocks):
        if not program.is_file():
            raise UserError(f"{program} is missing", mend="run this on a Jetson, outside any container")
    if board.state.is_dir():
        found = board.state.stat()
        if found.st_uid != board.owner or found.st_mode & 0o022:
            raise UserError(f"others may write to {board.state}", mend="remove it, with what it says to restore")


def _query(board: Board) -> Mode:
    said = _run([str(board.nvpmodel), "-q"], board)
    mode = sensors.parse_query(said)
    if mode is None:
        raise OrinKitError(f"nvpmodel -q says no mode, but: {said!r}", mend="see what `sudo nvpmodel -q` says")
    return mode


def _change_mode(board: Board, current: Mode, wanted: Mode, reboot: bool) -> str:
    if wanted.id == current.id:
        return f"power mode {current.name} already"
    # nvpmodel asks only where the mode needs a reboot; any other word than YES leaves everything as it is.
    said = _run([str(board.nvpmodel), "-m", str(wanted.id)], board, answer="YES\n" if reboot else "NO\n", check=False)
    if REBOOT_NEEDED in said:
        if not reboot:
            what = f"power mode {wanted.name} needs a reboot, and nothing was changed"
            raise UserError(what, mend="add --reboot, which reboots at once")
        return f"rebooting into power mode {wanted.name}"
    now = _query(board)
    if now.id != wanted.id:
        raise OrinKitError(f"nvpmodel stayed in mode {now.name}: {said!r}", mend=f"try sudo nvpmodel -m {wanted.id}")
    return f"power mode {wanted.name}"


def _save(board: Board, mode: Mode) -> None:
    board.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    board.saved_clocks.unlink(missing_ok=True)  # jetson_clocks would ask whether to overwrite it
    _run([str(board.jetson_clocks), "--store", str(board.saved_clocks)], board)
    if not board.saved_clocks.is_file() or not board.saved_clocks.stat().st_size:
        raise OrinKitError("jetson_clocks --store stored nothing", mend="see what `sudo jetson_clocks --show` says")
    partial = board.saved_mode.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(mode)), "utf-8")
    partial.replace(board.saved_mode)  # last: with it, all is there


def _saved(board: Board) -> Mode:
    try:
        entry = json.loads(board.saved_mode.read_text("utf-8"))
        return Mode(int(entry["id"]), str(entry["name"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{board.saved_mode} is damaged", mend="remove it and choose a mode with `set`") from error


def _forget(board: Board) -> None:
    board.saved_mode.unlink(missing_ok=True)
    board.saved_clocks.unlink(missing_ok=True)


def _run(command: Sequence[str], board: Board, *, answer: str = "", check: bool = True) -> str:
    """What a program says on both streams; with `check`, its errors are raised.

    jetson_clocks keeps the fan's state in `$HOME`, which is to be the same at storing and at restoring.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, input=answer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S,
            check=False, env={**os.environ, "HOME": str(board.state)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OrinKitError(f"{name} did not end within {TIMEOUT_S:g} s", mend="run it by hand to see why") from None
    said = done.stdout.strip()
    if check and (done.returncode or said.startswith("Error") or "\nError" in said or "NVPM ERROR" in said):
        raise OrinKitError(f"{' '.join(command)} failed: {said!r}", mend="run it by hand to see why")
    return said


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Power mode and clocks of a Jetson: look, change, and lead back."""


@commands.command("show")
def show_command() -> None:
    """Say the power mode, the modes there are, and whether the clocks are fixed."""
    click.echo(show(Board()))


@commands.command("set")
@click.option("--mode", help="Number or name of a power mode: 0, MAXN, 30W.")
@click.option("--clocks", is_flag=True, help="Fix CPU, GPU and memory clocks at their highest.")
@click.option("--reboot", is_flag=True, help="Reboot at once where the mode needs it.")
def set_command(mode: str | None, clocks: bool, reboot: bool) -> None:
    """Choose a power mode, fix the clocks, or both."""
    if mode is None and not clocks:
        raise click.UsageError("Give --mode, --clocks or both.")
    click.echo(set_power(Board(), mode=mode, clocks=clocks, reboot=reboot))


@commands.command("restore")
@click.option("--reboot", is_flag=True, help="Reboot at once where the mode needs it; then restore again.")
def restore_command(reboot: bool) -> None:
    """Lead back to what was set before the first change."""
    click.echo(restore(Board(), reboot=reboot))


def main() -> None:
    """Run the command line; a failure is one line and an exit code (2: the user's, 1: ours)."""
    try:
        commands.main(prog_name="power.sh")
    except OrinKitError as error:
        click.echo(f"power.sh: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
