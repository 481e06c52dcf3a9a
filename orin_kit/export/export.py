"""`orin-kit export`: a checkpoint to an ONNX directory that any backend of the runtime opens."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orin_kit.errors import UserError
from orin_kit.export.decoder import build_decoder
from orin_kit.export.dialect import Dialect
from orin_kit.export.dialects.ort import OrtDialect
from orin_kit.export.dialects.reference import ReferenceDialect
from orin_kit.export.dialects.trt_native import TrtNativeDialect
from orin_kit.export.dialects.trt_plugin import TrtPluginDialect
from orin_kit.export.options import DEFAULT_GROUP, DEFAULT_MAX_LEN, GraphOptions
from orin_kit.export.save import save
from orin_kit.export.tensors import DecoderTensors
from orin_kit.manifest import MANIFEST, ONNX_DATA, ONNX_MODEL, read_manifest, write_artifact
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.spec import HEAD, DecoderSpec
from orin_kit.quantize.rounded import RoundedCheckpoint
from orin_kit.tokenizer import copy_tokenizer

DIALECTS: dict[str, type[Dialect]] = {
    "ort": OrtDialect,
    "reference": ReferenceDialect,
    "trt_plugin": TrtPluginDialect,
    "trt_native": TrtNativeDialect,
}
KV_UPDATES = ("select", "layer")
PACKED = ("int4", "int8")
PRECISIONS = ("fp32", "fp16", "bf16", *PACKED)
# MatMulNBits: int8 activations are the fast path of the CPU provider; on CUDA weights are dequantized to the
# activations' dtype whatever is said. onnxruntime-genai's builder chooses the same.
ACCURACY_LEVELS = {"cpu": 4, "cuda": 0}


def export(
    model: str | Path,
    out: str | Path,
    *,
    precision: str | None = None,
    activations: str | None = None,
    dialect: str = "ort",
    max_len: int | None = None,
    group_size: int | None = None,
    embedding_bits: int | None = None,
    tie: bool | None = None,
    kv_bits: int | None = None,
    kv_update: str = "select",
    lora_targets: Collection[str] = (),
    provider: str = "cpu",
    accuracy_level: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Export a checkpoint, plain or INT4, to `out/model.onnx` with its weights in `model.onnx.data`.

    Args:
        model: checkpoint directory.
        out: the artifact to write (kind `onnx`).
        precision: of the weights, one of `PRECISIONS`; when not given as the checkpoint is quantized, else fp32 (fp16
            in the trt dialects). int4 rounds a plain checkpoint to nearest while it is read (`orin-kit quantize` loses
            less).
        activations: fp32, fp16 or bf16, also of the cache; when not given fp32 for packed weights (fp16 in the trt
            dialects), else the precision.
        dialect: a key of `DIALECTS`.
        max_len: the longest context, prompt and answer; by default the model's own, at most `DEFAULT_MAX_LEN`.
        group_size: of a plain checkpoint rounded to int4, input features that share a scale; 128 when not given.
        embedding_bits: 16, 8 or 4; by default what `orin-kit quantize` was told, and 4 where a plain checkpoint is
            rounded.
        tie: store a tied model's packed head and embedding once, as one table of the head's bits and groups. By
            default where `orin-kit quantize` made them so, and where a plain checkpoint is rounded to 4 bits in both.
        kv_bits: of the KV cache: 16 for the activations' dtype, 8 for int8 with the scales that the checkpoint holds;
            by default 8 where it holds them.
        kv_update: of the `trt_native` dialect, one of `KV_UPDATES`; "layer" needs a parser of TensorRT 11.
        lora_targets: linears that LoRA adapters may change at run time, "q_proj" and so on, or "all".
        provider: what onnxruntime will run on, a key of `ACCURACY_LEVELS`; the graph runs on the others too.
        accuracy_level: of `MatMulNBits`, 0 to 4, instead of the provider's own.
        overwrite: replace an existing artifact.
        progress: show a progress bar.

    Returns:
        What the manifest's `results` say: `parameters`, `model_bytes`.

    Raises:
        UserError: an option that does not fit the checkpoint.
        ArtifactError: the checkpoint is not whole.
    """
    model = Path(model)
    _check_dialect(dialect, kv_update, tie)
    checkpoint = Checkpoint(model)
    spec, stored = checkpoint.spec, _stored_precision(checkpoint)
    for_tensorrt = dialect.startswith("trt_")  # strongly typed networks, whose fast kernels are fp16
    precision = precision or stored or ("fp16" if for_tensorrt else "fp32")
    rounds = _rounds(model, precision, stored, activations, group_size)
    packed = precision in PACKED
    activations = activations or (precision if not packed else "fp16" if for_tensorrt else "fp32")
    if rounds:
        checkpoint = RoundedCheckpoint(model, group_size or DEFAULT_GROUP)
    tensors = DecoderTensors(checkpoint, dequantize=not packed)
    tied = DIALECTS[dialect].ties and _tied_table(model, tensors, rounds, tie, embedding_bits)
    if embedding_bits is None:
        embedding_bits = _quantized_embedding_bits(model, rounds) if packed else 16
    options = GraphOptions(
        tied_table=tied,
        kv_bits=_kv_bits(checkpoint, kv_bits),
        accuracy_level=ACCURACY_LEVELS[provider] if accuracy_level is None else accuracy_level,
        kv_update=kv_update,
        lora_targets=_lora_targets(spec, lora_targets),
    )
    settings = {
        "precision": precision, "activations": activations, "dialect": dialect, "max_len": _positions(spec, max_len),
        "embedding_bits": embedding_bits, **asdict(options),
    }  # fmt: skip
    if rounds:
        settings |= {"method": "rtn", "group_size": group_size or DEFAULT_GROUP}
    with write_artifact(out, "onnx", inputs={"model": model}, settings=settings, overwrite=overwrite) as artifact:
        graph = build_decoder(
            tensors,
            DIALECTS[dialect],
            activations=activations,
            max_positions=settings["max_len"],
            embedding_bits=embedding_bits,
            options=options,
        )
        save(graph, artifact.directory / ONNX_MODEL, progress=progress)
        shutil.copyfile(model / "config.json", artifact.directory / "config.json")
        copy_tokenizer(model, artifact.directory)
        model_bytes = sum((artifact.directory / name).stat().st_size for name in (ONNX_MODEL, ONNX_DATA))
        artifact.results |= {"parameters": spec.num_parameters, "model_bytes": model_bytes}
    return artifact.results


def _check_dialect(dialect: str, kv_update: str, tie: bool | None) -> None:
    if dialect not in DIALECTS:
        raise UserError(f"dialect {dialect!r} is not known", mend=f"use one of {', '.join(DIALECTS)}")
    if kv_update not in KV_UPDATES:
        raise UserError(f"kv update {kv_update!r} is not known", mend=f"use one of {', '.join(KV_UPDATES)}")
    if tie and not DIALECTS[dialect].ties:
        raise UserError(f"the {dialect} dialect stores head and embedding as two tables", mend="leave out --tie")


def _stored_precision(checkpoint: Checkpoint) -> str | None:
    """What a quantized checkpoint's first packed linear is; None for plain checkpoints."""
    linears = (f"model.layers.0.{name}" for name in checkpoint.spec.linear_shapes())
    packings = (checkpoint.packing(name) for name in (*linears, HEAD))
    return next((f"int{packing.bits}" for packing in packings if packing is not None), None)


def _rounds(model: Path, precision: str, stored: str | None, activations: str | None, group_size: int | None) -> bool:
    """Whether a plain checkpoint is to be rounded to int4.

    Raises:
        UserError: the options fit neither each other nor the checkpoint.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is not known", mend=f"use one of {', '.join(PRECISIONS)}")
    if precision in PACKED and stored not in (None, precision):
        raise UserError(f"{model} is {stored}, not {precision}", mend="leave out --precision")
    if precision == "int8" and stored is None:
        raise UserError(f"{model} is not quantized", mend=f"run orin-kit quantize {model} --bits 8 --out DIR first")
    rounds = precision == "int4" and stored is None
    if group_size is not None and not rounds:
        raise UserError("a group size is for rounding a plain checkpoint to int4", mend="leave out --group-size")
    if precision not in PACKED and activations not in (None, precision):
        raise UserError(f"{precision} weights need {precision} activations", mend="leave out --activations")
    return rounds


def _positions(spec: DecoderSpec, max_len: int | None) -> int:
    if max_len and max_len > spec.max_position_embeddings:
        what = f"--max-len {max_len} is longer than the model's context of {spec.max_position_embeddings}"
        raise UserError(what, mend="choose a shorter one")
    return min(max_len or DEFAULT_MAX_LEN, spec.max_position_embeddings)


def _quantized_embedding_bits(model: Path, rounds: bool) -> int:
    if rounds:
        return 4
    if not (model / MANIFEST).is_file():
        return 16
    return int(read_manifest(model).settings.get("embedding_bits", 16))


def _tied_table(
    model: Path, tensors: DecoderTensors, rounds: bool, tie: bool | None, embedding_bits: int | None
) -> bool:
    """Whether the embedding is the packed head, stored once.

    Raises:
        UserError: `tie` asks for it where they are two tables.
    """
    head = tensors.head()
    one = head.bits is not None and (tensors.spec.tie_word_embeddings if rounds else _says_tied(model))
    one = one and embedding_bits in (None, head.bits)
    if tie and not one:
        what = f"{model}: head and embedding are not one packed table"
        raise UserError(what, mend="leave out --tie, or quantize a tied model with its head and table alike")
    return one if tie is None else tie


def _says_tied(model: Path) -> bool:
    return (model / MANIFEST).is_file() and bool(read_manifest(model).settings.get("tied_table", False))


def _kv_bits(checkpoint: Checkpoint, wanted: int | None) -> int:
    has_scales = checkpoint.kv_scales(0) is not None
    if wanted == 8 and not has_scales:
        what = f"{checkpoint.directory} holds no scales for an int8 KV cache"
        raise UserError(what, mend="leave out --kv-bits, or calibrate them when it is quantized")
    return wanted or (8 if has_scales else 16)


def _lora_targets(spec: DecoderSpec, wanted: Collection[str]) -> tuple[str, ...]:
    known = [name.rpartition(".")[2] for name in spec.linear_shapes()]
    if "all" in wanted:
        return tuple(known)
    for name in wanted:
        if name not in known:
            raise UserError(f"no linear is called {name}", mend=f"choose from {', '.join(known)}, or all")
    return tuple(name for name in known if name in wanted)
