"""A report of the doctor on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orin_kit.doctor.doctor import Check, Report

WIDTH = 110


def print_report(report: Report, console: Console | None = None) -> None:
    """A line a check, what mends it below, and the verdict; at most `WIDTH` columns, on stdout."""
    if console is None:
        console = Console()
        console = Console(width=min(WIDTH, console.width) if console.is_terminal else WIDTH)
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("sign", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("said", overflow="fold")
    for check in report.checks:
        table.add_row(_sign(check), check.name, _said(check))
    console.print(table)
    console.print(Text(verdict(report), style="bold"))


def verdict(report: Report) -> str:
    """The last line."""
    missing = [check.name for check in report.checks if check.needed and not check.ok]
    if missing:
        return f"To mend before an engine can run: {', '.join(missing)}."
    advised = [check.name for check in report.checks if not check.ok]
    return f"Ready. For speed and steady figures: {', '.join(advised)}." if advised else "Ready."


def _sign(check: Check) -> Text:
    if check.ok:
        return Text("ok", style="green")
    return Text("mend", style="bold red" if check.needed else "yellow")


def _said(check: Check) -> Text:
    said = Text(check.found)
    if not check.ok:
        said.append(f"\n{'' if check.needed else 'optional: '}{check.mend}", style="dim")
    return said
