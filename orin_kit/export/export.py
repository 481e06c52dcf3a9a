"""`orin-kit export`: a checkpoint to an ONNX directory that any backend of the runtime opens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from orin_kit.errors import UserError
from orin_kit.export.decoder import build_decoder
from orin_kit.export.dialect import Dialect
from orin_kit.export.dialects.ort import OrtDialect
from orin_kit.export.dialects.reference import ReferenceDialect
from orin_kit.export.tensors import DecoderTensors
from orin_kit.manifest import MANIFEST, ONNX_DATA, ONNX_MODEL, read_manifest, write_artifact
from orin_kit.models.spec import read_spec
from orin_kit.tokenizer import copy_tokenizer

DIALECTS: dict[str, type[Dialect]] = {"ort": OrtDialect, "reference": ReferenceDialect}
PRECISIONS = ("fp32", "fp16", "int4")
DEFAULT_MAX_LEN = 4096


def export(
    model: str | Path,
    out: str | Path,
    *,
    precision: str | None = None,
    activations: str | None = None,
    dialect: str = "ort",
    max_len: int | None = None,
    embedding_bits: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Export a checkpoint, plain or INT4, to `out/model.onnx` with its weights in `model.onnx.data`.

    Args:
        model: checkpoint directory.
        out: the artifact to write (kind `onnx`).
        precision: of the weights, one of `PRECISIONS`; when not given int4 for INT4 checkpoints, else fp32.
        activations: fp32 or fp16, also of the cache; fp16 for precision fp16, else fp32, when not given.
        dialect: a key of `DIALECTS`.
        max_len: the longest context, prompt and answer; by default the model's own, at most `DEFAULT_MAX_LEN`.
        embedding_bits: 16, 8 or 4; what `orin-kit quantize` was told by default.
        overwrite: replace an existing artifact.
        progress: show a progress bar.

    Returns:
        What the manifest's `results` say: `parameters`, `model_bytes`.

    Raises:
        UserError: an option that does not fit the checkpoint.
        ArtifactError: the checkpoint is not whole.
    """
    model = Path(model)
    spec = read_spec(model)
    packed = spec.quantization_config is not None
    precision = precision or ("int4" if packed else "fp32")
    activations = activations or ("fp16" if precision == "fp16" else "fp32")
    if precision == "int4" and not packed:
        raise UserError(f"{model} is not quantized", mend=f"run orin-kit quantize {model} --out DIR first")
    if precision not in ("int4", activations):
        raise UserError(f"{precision} weights need {precision} activations", mend="leave out --activations")
    if embedding_bits is None:
        embedding_bits = _quantized_embedding_bits(model) if precision == "int4" else 16
    positions = min(max_len or DEFAULT_MAX_LEN, spec.max_position_embeddings)
    if max_len and max_len > spec.max_position_embeddings:
        what = f"--max-len {max_len} is longer than the model's context of {spec.max_position_embeddings}"
        raise UserError(what, mend="choose a shorter one")
    settings = {
        "precision": precision, "activations": activations, "dialect": dialect, "max_len": positions,
        "embedding_bits": embedding_bits,
    }  # fmt: skip
    tensors = DecoderTensors(model, spec, dequantize=precision != "int4")
    with write_artifact(out, "onnx", inputs={"model": model}, settings=settings, overwrite=overwrite) as artifact:
        graph = build_decoder(
            tensors,
            DIALECTS[dialect],
            activations=activations,
            max_positions=positions,
            embedding_bits=embedding_bits,
        )
        _save(graph, artifact.directory / ONNX_MODEL, progress)
        shutil.copyfile(model / "config.json", artifact.directory / "config.json")
        copy_tokenizer(model, artifact.directory)
        model_bytes = sum((artifact.directory / name).stat().st_size for name in (ONNX_MODEL, ONNX_DATA))
        artifact.results |= {"parameters": spec.num_parameters, "model_bytes": model_bytes}
    return artifact.results


def _save(graph: ir.Model, path: Path, progress: bool) -> None:
    """Write graph and weights, one tensor in memory at a time."""
    total = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("export", total=total)
        step: Callable[[Any, Any], None] = lambda tensor, _info: bar.advance(task, tensor.nbytes)  # noqa: E731
        # One worker: two would hold two tensors, and a 1.5B embedding alone is 0.9 GB in fp32.
        ir.save(graph, path, external_data=ONNX_DATA, size_threshold_bytes=1024, callback=step, max_workers=1)
        bar.update(task, completed=total)


def _quantized_embedding_bits(model: Path) -> int:
    if not (model / MANIFEST).is_file():
        return 16
    return int(read_manifest(model).settings.get("embedding_bits", 16))
