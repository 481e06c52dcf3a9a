"""What `decode.py` measured, in figures: weights read a token, the floor that bandwidth sets, medians, tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Of these nodes' constants a step reads a row or a few, not the whole: embedding tables, rotary tables.
LOOKUPS = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")


def onnx_bytes_a_token(model: Path) -> int:
    """Bytes of constants that one decode step reads whole, in an ONNX decoder; the data file is not opened.

    A table that is both looked up and multiplied (a tied embedding) counts once.
    """
    import onnx
    from onnx import helper

    graph = onnx.load(model, load_external_data=False).graph
    read = {name for node in graph.node if node.op_type not in LOOKUPS for name in node.input}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in read:
            count = 1
            for size in tensor.dims:
                count *= size
            bits = 4 if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) else 0
            bits = bits or helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
            total += count * bits // 8
    return total


def onnx_cache_bytes_a_token(model: Path, head_dim: int) -> int:
    """Bytes of keys and values that a token takes in the cache: inputs `[batch, kv_heads, length, head_dim]`.

    Args:
        model: the ONNX file.
        head_dim: of the model, for graphs that do not say it.
    """
    import onnx
    from onnx import helper

    total = 0
    for value in onnx.load(model, load_external_data=False).graph.input:
        if value.name.startswith("past_key_values."):
            kind = value.type.tensor_type
            sizes = [dim.dim_value for dim in kind.shape.dim]
            total += sizes[1] * (sizes[3] or head_dim) * helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return total


def gguf_bytes_a_token(model: Path) -> int:
    """Bytes of a GGUF's tensors that one step reads whole: all, but an embedding that has a head beside it."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def file_bytes(model: Path) -> int:
    """Of the weights and the graph, without tokenizers and logs."""
    files = [model] if model.is_file() else list(model.iterdir())
    return sum(f.stat().st_size for f in files if f.suffix in (".gguf", ".onnx", ".data", ".safetensors"))


def best_bandwidth(rounds: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """The fastest read of all rounds, bytes a second, by kind of pages."""
    return {pages: max(max(one[pages]) for one in rounds) for pages in rounds[0]}


def floor_seconds(row: dict[str, Any], context: float, bandwidth: float) -> float:
    """The least a decode step can take: its weights and the cache's tokens, read once each."""
    return float(row["bytes_a_token"] + context * row["cache_bytes_a_token"]) / bandwidth


def figures(row: dict[str, Any], bandwidth: float) -> dict[str, list[float]]:
    """One value a process: tokens/s of prefills and decodes, shares of the floor, seconds of load, bytes resident.

    A process's prefill is the median of its prompts of that length; its decode step the median of its steps.
    """
    found: dict[str, list[float]] = {}
    for run in row["runs"]:
        for length in sorted({one["prompt"] for one in run["passes"]}):
            mine = [one for one in run["passes"] if one["prompt"] == length]
            prefill = statistics.median(one["prefill"] for one in mine)
            found.setdefault(f"prefill {length}", []).append(length / prefill)
            steps = [step for one in mine for step in one["steps"]]
            if steps:
                step = statistics.median(steps)
                middle = length + len(mine[0]["steps"]) / 2  # tokens in the cache, half way
                found.setdefault(f"decode {length}", []).append(1 / step)
                found.setdefault(f"share {length}", []).append(floor_seconds(row, middle, bandwidth) / step)
        found.setdefault("load", []).append(run["load"])
        for kind in ("resident", "anonymous", "file", "peak"):
            found.setdefault(kind, []).append(run["memory"]["end"][kind])
    return found


def spread(values: Sequence[float]) -> str:
    """Median, and the least and the most where there are several; three digits that count."""
    middle, least, most = (_short(f(values)) for f in (statistics.median, min, max))
    return middle if len(values) == 1 else f"{middle} ({least}-{most})"


def _short(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def speed_table(rows: Sequence[dict[str, Any]], bandwidth: float) -> list[list[str]]:
    """Heads, then a line a row: prefills, decodes with their share of the floor."""
    measured = [figures(row, bandwidth) for row in rows]
    keys = dict.fromkeys(key for one in measured for key in one if key.startswith(("prefill", "decode")))
    columns = sorted(keys, key=lambda key: (key.startswith("decode"), int(key.split()[1])))
    lines = [["engine", *(f"{key.replace('decode', 'decode at')}, tok/s" for key in columns), "logits"]]
    for row, one in zip(rows, measured, strict=True):
        line = [row["case"]]
        for key in columns:
            share = one.get(key.replace("decode", "share")) if key.startswith("decode") else None
            line.append((spread(one[key]) if key in one else "-") + (f", {_percent(share)}" if share else ""))
        lines.append([*line, f"{row['correlation']:.3f}" if "correlation" in row else "-"])
    return lines


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * statistics.median(shares):.0f} %"


def memory_table(rows: Sequence[dict[str, Any]], bandwidth: float) -> list[list[str]]:
    """Heads, then a line a row: bytes resident and on disk, bytes that a step reads, seconds of load."""
    heads = ["engine", "resident, GB", "of it own", "of it file-backed", "peak, GB", "load, s", "file, GB"]
    lines = [[*heads, "weights read a token, GB", "cache a token, kB"]]
    for row in rows:
        one = figures(row, bandwidth)
        kinds = (statistics.median(one[kind]) for kind in ("resident", "anonymous", "file", "peak"))
        line = [row["case"], *(f"{kind / 1e9:.2f}" for kind in kinds), spread(one["load"])]
        line += [f"{row['file_bytes'] / 1e9:.2f}", f"{row['bytes_a_token'] / 1e9:.3f}"]
        lines.append([*line, f"{row['cache_bytes_a_token'] / 1e3:.1f}"])
    return lines


def markdown(report: dict[str, Any]) -> str:
    """All tables, each with its bandwidth and what ran."""
    return "\n\n".join("\n".join(_section(shape, section)) for shape, section in report["shapes"].items()) + "\n"


def _section(shape: str, section: dict[str, Any]) -> Iterator[str]:
    bandwidth, rows = best_bandwidth(section["bandwidth"]), [row for row in section["rows"] if row["runs"]]
    usual = {pages: statistics.median(max(one[pages]) for one in section["bandwidth"]) for pages in bandwidth}
    reads = ", ".join(
        f"{best / 1e9:.1f} GB/s on {pages} ({usual[pages] / 1e9:.1f})" for pages, best in bandwidth.items()
    )
    yield f"### Qwen2.5-{shape.upper()}\n"
    yield f"Best read bandwidth of the run (median of the rounds' best), {section['bandwidth_by']}: {reads}."
    yield "Percentages are of the largest.\n"
    for table in (speed_table, memory_table):
        heads, *lines = table(rows, max(bandwidth.values()))
        yield line_of_table(heads)
        yield line_of_table(["---", *["---:"] * (len(heads) - 1)])
        yield from (line_of_table(line) for line in lines)
        yield ""
    yield "Versions: " + "; ".join(dict.fromkeys(row["runs"][0]["version"] for row in rows)) + "."


def line_of_table(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
