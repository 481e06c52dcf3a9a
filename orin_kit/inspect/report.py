"""An inspection on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from orin_kit.inspect.inspection import Adapters, Graph, Inspection, Made, Model, Port, Prediction
from orin_kit.inspect.tensors import Packing
from orin_kit.profile.targets import GB

WIDTH = 100
KINDS = {
    "model": "a checkpoint made by orin-kit",
    "checkpoint": "a Hugging Face checkpoint",
    "config": "a checkpoint's config, without weights",
    "int4": "a quantized checkpoint made by orin-kit",
    "onnx": "an ONNX artifact",
    "demo": "a run of orin-kit demo",
}
SHOWN_PORTS = 6


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Tables of at most `WIDTH` columns, on stdout."""
    if console is None:
        console = Console()
        console = Console(width=min(WIDTH, console.width) if console.is_terminal else WIDTH)
    for part in _parts(found):
        console.print(part)


def size(count: int) -> str:
    """Bytes in decimal units, three digits: "28.7 kB", "820 MB", "1.10 GB"."""
    for unit, factor in (("GB", GB), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor * 0.9995:
            value = count / factor
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{count} B"


def _parts(found: Inspection) -> Iterator[RenderableType]:
    what = KINDS.get(found.kind, f"a {found.kind} artifact")
    yield Text(
        _plain(
            f"{found.directory}: {what}, {found.files} file{'s' * (found.files != 1)}, {size(found.disk_bytes)} on disk"
        ),
        "bold",
    )
    if found.made:
        yield _made(found.made)
    if found.model:
        # A quantized checkpoint of one table has it as transformers wants it too.
        table_twice = found.graph is None and found.made is not None and bool(found.made.settings.get("tied_table"))
        yield _model(found.model, table_twice=table_twice)
        if found.model.kinds:
            yield _kinds(found.model)
        yield _cache(found.model, exported=found.graph is not None)
    if found.graph:
        yield _graph(found.graph)
    for line in found.mismatches:
        yield Text(_plain(f"MISMATCH  {line}"), "bold red")
    if found.mismatches:
        yield Text("The weights do not belong to this config.json: get both from one model.", "red")
    if found.predictions:
        yield _predictions(found)
        yield Text("\n".join(f"- {line}" for line in found.assumptions), "dim")
    if found.contents:
        yield _pairs({key: value for key, value in found.contents.items() if key != "rows"})
        for row in found.contents.get("rows", []):
            yield Text(_plain(_said(row)))


def _made(made: Made) -> Table:
    checked = "sizes and sha256 are the manifest's" if made.verified else "sizes are the manifest's (--verify: sha256)"
    inputs = {
        f"from {role}": f"{entry.path} (sha256 {entry.sha256[:12]}, {entry.now})" for role, entry in made.inputs.items()
    }
    return _pairs(
        {
            "made by": f"{made.made_by}, {made.created}",
            "settings": made.settings,
            **inputs,
            "files": f"{made.files}, {checked}",
        }
    )


def _model(model: Model, *, table_twice: bool) -> Table:
    sizes = ", ".join(f"{name} {value:,}" for name, value in model.sizes.items())
    stored = "no weights" if model.stored_parameters is None else f"{model.stored_parameters:,}"
    packed = [f"{stored}", *map(_packing, model.packings)]
    if table_twice:
        packed.append("head and embedding are one table, stored packed and dequantized")
    head = "the embedding table (tied)" if model.tied else f"{model.head_parameters:,}"
    return _pairs(
        {
            "decoder": ", ".join([model.family, model.mixer, *model.traits]),
            **({"quantized": model.quantization} if model.quantization else {}),
            "sizes": sizes,
            "parameters": f"{model.parameters:,}; embedding {model.embedding_parameters:,}; head: {head}",
            "in the files": "; ".join(packed),
        }
    )


def _packing(packing: Packing) -> str:
    group = f" in groups of {packing.group_size}" if packing.group_size else ""
    zeros, order = " with zero points" * packing.zero_points, " in act-order" * packing.order
    kinds = ", ".join(kind.replace("_", " ") for kind in packing.kinds)
    return f"INT{packing.bits}{group}{zeros}{order} ({packing.count}: {kinds})"


def _kinds(model: Model) -> Table:
    table = _table("kind", "parameters", "type", "packed", "scales", "plain", "bytes", "read a token")
    tied_to_table = not any(row.kind == "head" for row in model.kinds)
    for row in model.kinds:
        name = {"mixer": model.mixer, "embedding": "embedding, head" if tied_to_table else "embedding"}.get(
            row.kind, row.kind.replace("_", " ")
        )
        counts = (row.packed_bytes, row.scale_bytes, row.plain_bytes, row.bytes, row.token_bytes)
        cells = [size(count) if count else "" for count in counts]
        table.add_row(name, f"{row.parameters:,}" if row.parameters else "", "+".join(row.dtypes), *cells)
    table.add_section()
    table.add_row(
        "all", f"{model.stored_parameters:,}", "", "", "", "", size(model.weights_bytes), size(model.token_bytes)
    )
    return table


def _cache(model: Model, *, exported: bool) -> Text:
    dtype = model.cache_dtype if exported else f"taken as {model.cache_dtype}"
    if model.mixer == "convolution":
        return Text(f"State: {size(model.conv_state_bytes)} a row ({dtype}), the same at any length.")
    full = size(model.max_len * model.kv_bytes_per_token)
    scales = f"; scales {size(model.kv_scale_bytes)} in all" if model.kv_scale_bytes else ""
    a_token = f"{model.kv_bytes_per_token:,} bytes a token ({dtype})"
    return Text(f"KV cache: {a_token}, {full} at max_len {model.max_len:,}{scales}.")


def _graph(graph: Graph) -> Table:
    opsets = ", ".join(f"{domain} {version}" for domain, version in graph.opsets.items())
    ops = {
        f"{domain}: {sum(counts.values())}": ", ".join(f"{op} {count}" for op, count in counts.items())
        for domain, counts in graph.ops.items()
    }
    weights = ", ".join(
        f"{i.kind.replace('_', ' ')} {i.dtype} {size(i.bytes)} in {i.count}" for i in graph.initializers
    )
    files = ", ".join(f"{name} ({size(count)} used), all there" for name, count in graph.external_files.items())
    return _pairs(
        {
            "graph": f"dialect {graph.dialect}, ONNX IR {graph.ir_version} by {graph.producer or 'unknown'}; {opsets}",
            **ops,
            "inputs": _ports(graph.inputs),
            "outputs": _ports(graph.outputs),
            **({"adapters": _adapters(graph.adapters)} if graph.adapters else {}),
            "initializers": weights,
            **({"shared": _shared(graph)} if graph.shared else {}),
            "external data": files or "none, all weights lie in the model file",
        }
    )


def _adapters(adapters: Adapters) -> str:
    return (
        f"LoRA of any rank for {', '.join(adapters.targets)}: {adapters.linears} linears, "
        f"{size(adapters.bytes_per_rank)} a rank ({adapters.dtype})"
    )


def _shared(graph: Graph) -> str:
    return "; ".join(f"{name} is the bytes of {other}" for name, other in graph.shared.items())


def _ports(ports: Sequence[Port]) -> str:
    said = [f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]" for port in ports[:SHOWN_PORTS]]
    return "; ".join(said) + (f"; and {len(ports) - SHOWN_PORTS} more" if len(ports) > SHOWN_PORTS else "")


def _predictions(found: Inspection) -> Table:
    first = found.predictions[0]
    table = _table(
        "form", "weights", "read\na token", "TPOT ms\nat peak", "TPOT ms\npredicted", "TTFT ms\nat peak",
        "TTFT ms\npredicted", f"memory, target\n{first.memory_target_bytes / GB:g} GB",
    )  # fmt: skip
    table.title = Text(
        f"PREDICTED, NOT MEASURED: {found.device}, TPOT at context {first.context:,}, "
        f"TTFT of a prompt of {first.prompt_length:,}",
        "bold yellow",
    )
    table.title_justify = "left"
    for row in found.predictions:
        table.add_row(*_prediction(row))
    return table


def _prediction(row: Prediction) -> list[str]:
    spans = []
    for span in (row.tpot, row.ttft):
        spans += [_time(span.bound_ms), f"{_time(span.low_ms)}-{_time(span.high_ms)}"]
    fits = "fits" if row.fits else "above"
    return [row.form, size(row.weights_bytes), size(row.decode_bytes), *spans, f"{size(row.memory_bytes)} {fits}"]


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.{1 if milliseconds >= 10 else 2 if milliseconds >= 0.1 else 4}f}"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("kind", "form", "type") else "right")
    return table


def _pairs(pairs: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", max_width=26)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(Text(_plain(name)), Text(_plain(_said(value))))
    return table


def _said(value: Any) -> str:
    """JSON in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} ({_said(v)})" if isinstance(v, dict | list) else f"{key} {_said(v)}"
                         for key, v in value.items())  # fmt: skip
    if isinstance(value, list):
        return "; ".join(map(_said, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """What others wrote into names and manifests may be control characters: none reaches the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
