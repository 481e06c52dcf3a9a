"""Write a graph: `model.onnx`, and its weights in `model.onnx.data`, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from orin_kit.export.dialect import SAME_BYTES
from orin_kit.manifest import ONNX_DATA

IN_FILE = 1024  # bytes; smaller tensors lie in model.onnx itself


def save(model: ir.Model, path: Path, *, progress: bool) -> None:
    """Write `model` to `path` and its weights beside it. Its initializers are files' parts afterwards.

    Initializers made by `Graph.same_bytes` name the place of the tensor whose bytes they are: stored once, and mapped
    into memory once.
    """
    initializers = model.graph.initializers
    copies = {
        value: initializers[value.meta[SAME_BYTES]] for value in initializers.values() if SAME_BYTES in value.meta
    }
    shapes = {copy: copy.const_value for copy in copies}
    for copy in copies:
        copy.const_value = None  # not to be written
    total = sum(value.const_value.nbytes for value in initializers.values() if value.const_value)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("export", total=total)
        step: Callable[[Any, Any], None] = lambda tensor, _info: bar.advance(task, tensor.nbytes)  # noqa: E731
        # One worker: two would hold two tensors, and a 1.5B embedding alone is 0.9 GB in fp32.
        ir.external_data.unload_from_model(
            model, path.parent, ONNX_DATA, size_threshold_bytes=IN_FILE, callback=step, max_workers=1
        )
        for copy, original in copies.items():
            copy.const_value = _seen_as(shapes[copy], original.const_value)
        ir.save(model, path)
        bar.update(task, completed=total)


def _seen_as(wanted: ir.TensorProtocol | None, stored: ir.TensorProtocol | None) -> ir.TensorProtocol:
    """The bytes of `stored` in the shape and with the name of `wanted`."""
    assert wanted is not None and wanted.name is not None
    if not isinstance(stored, ir.ExternalTensor):
        return wanted  # so small that it lies in model.onnx
    return ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        stored.dtype,
        shape=ir.Shape(wanted.shape.numpy()),
        name=wanted.name,
        base_dir=stored.base_dir,
    )
