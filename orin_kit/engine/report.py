"""A plan on the terminal, and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from orin_kit.engine.build import Source
from orin_kit.engine.plan import DECODE, PREFILL, PROFILE_NAMES, Binding, Plan
from orin_kit.engine.trt import Range
from orin_kit.inspect.report import size

WIDTH = 110
LAYER = re.compile(r"\.\d+(?=\.|$)")


def plan_json(source: Source, plan: Plan) -> str:
    """The whole plan, field by field."""
    said = {
        "schema": "orin-kit/engine-plan/1",
        "onnx": str(source.directory),
        **asdict(plan),
        "run_bytes": plan.memory.run,
        "build_bytes": plan.memory.build,
    }
    return json.dumps(said, indent=2)


def print_plan(source: Source, plan: Plan, console: Console | None = None) -> None:
    """Tables of at most `WIDTH` columns, on stdout."""
    if console is None:
        console = Console()
        console = Console(width=min(WIDTH, console.width) if console.is_terminal else WIDTH)
    for part in _parts(source, plan):
        console.print(part)


def _parts(source: Source, plan: Plan) -> Iterator[RenderableType]:
    settings = source.manifest.settings
    yield Text(f"{source.directory} -> an engine of {len(plan.bindings)} inputs and outputs", "bold")
    yield Text(
        f"{settings.get('dialect')}, {settings.get('precision')} weights, {settings.get('activations')} activations; "
        f"the cache is written by: {plan.cache_writing}"
    )
    yield _profiles(plan)
    yield _bindings(plan)
    yield _memory(plan)
    if plan.creators:
        creators = ", ".join(f"{c.namespace}::{c.name} version {c.version}" for c in plan.creators)
        yield Text(f"plugin creators needed: {creators}")
    else:
        yield Text("no plugins needed")


def _profiles(plan: Plan) -> RenderableType:
    """Inputs alike in all layers are one line."""
    table = _table("input", "profile 0, prefill", "profile 1, decode")
    rows: dict[tuple[str, str, str], int] = {}
    for name in plan.profiles[PREFILL]:
        prefill, decode = (_range(plan.profiles[profile][name]) for profile in (PREFILL, DECODE))
        key = (LAYER.sub(".N", name), prefill, decode)
        rows[key] = rows.get(key, 0) + 1
    for (name, prefill, decode), count in rows.items():
        table.add_row(f"{name} (x {count})" if count > 1 else name, prefill, decode)
    return table


def _range(shapes: Range) -> str:
    """Least, optimal where it differs from both, and greatest of each dimension: `1..8 x 1..128..512`."""
    parts = []
    for least, optimal, greatest in zip(*shapes, strict=True):
        values = [least] if least == greatest else sorted({least, optimal, greatest})
        parts.append("..".join(map(str, values)))
    return " x ".join(parts)


def _bindings(plan: Plan) -> RenderableType:
    table = _table("binding", "type", f"largest ({', '.join(PROFILE_NAMES)})", "bytes of each", "in all")
    groups: dict[tuple[object, ...], list[Binding]] = {}
    for binding in plan.bindings:
        key = (LAYER.sub(".N", binding.name), binding.dtype, binding.greatest, binding.bytes, bool(binding.shares))
        groups.setdefault(key, []).append(binding)
    for group in groups.values():
        first = group[0]
        name = LAYER.sub(".N", first.name) if len(group) > 1 else first.name
        prefill, decode = (" x ".join(map(str, shape)) for shape in first.greatest)
        table.add_row(
            f"{'in' if first.is_input else 'out'} {name}" + (f" (x {len(group)})" if len(group) > 1 else ""),
            first.dtype,
            prefill if prefill == decode else f"{prefill}, {decode}",
            "its input's own" if first.shares else size(first.bytes),
            "" if first.shares else size(sum(one.bytes for one in group)),
        )
    return table


def _memory(plan: Plan) -> RenderableType:
    memory = plan.memory
    table = _table("memory", "bytes", "")
    for name, count, note in (
        ("weights", memory.weights, "counted, as ONNX stores them"),
        ("cache", memory.cache, f"counted: {plan.sizes.max_batch} x {plan.sizes.max_len} tokens"),
        ("inputs and outputs", memory.buffers, "counted"),
        ("activations", memory.activations, "estimated from the widest place of a layer"),
        ("to run", memory.run, "the sum; TensorRT and CUDA take some more for themselves"),
        ("to build", memory.build, "weights three times, and the workspace where it is limited: an estimate"),
    ):
        table.add_row(name, size(count), note)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
