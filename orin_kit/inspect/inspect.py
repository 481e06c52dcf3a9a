"""`orin-kit inspect`: what a directory is, read from headers and manifests; no weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orin_kit.errors import ArtifactError, UserError
from orin_kit.export.options import DEFAULT_MAX_LEN
from orin_kit.inspect.inspection import Input, Inspection, Made, Model
from orin_kit.inspect.onnx_file import VALUE_BYTES, read_onnx
from orin_kit.inspect.onnx_graph import caches, fixed_bytes, graph_of, stored_tensors
from orin_kit.inspect.predict import assumptions, predictions
from orin_kit.inspect.tensors import CACHE_SCALES, PACKED, ZERO_BIAS, Codes, Tensor, by_kind, mismatches, packings
from orin_kit.manifest import MANIFEST, ONNX_MODEL, Manifest, read_manifest, sha256_input
from orin_kit.models.formats.format import Format
from orin_kit.models.formats.registry import read_format
from orin_kit.models.spec import EMBEDDING, HEAD, DecoderSpec, read_spec
from orin_kit.models.weights import DTYPES, WeightSource
from orin_kit.profile.roofline import AGX_ORIN_64GB

CHECKPOINTS = ("model", "int4", "checkpoint", "config")  # kinds that are Hugging Face directories
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin")
DEMO_SUMMARY = "summary.json"
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "conv_kernel_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip
TRAITS = ("qkv_bias", "o_bias", "mlp_bias", "conv_bias", "qk_norm")


def inspect(
    directory: str | Path, *, context: int | None = None, prompt_length: int | None = None, verify: bool = False
) -> Inspection:
    """Say what a directory is: a checkpoint, plain or quantized, an ONNX artifact, or anything else orin-kit writes.

    Args:
        directory: to look at.
        context: tokens before the one whose time is predicted; 1024, or the longest that fits, when None.
        prompt_length: tokens of the prompt whose time is predicted; 128, or the longest that fits, when None.
        verify: compare every sha256 of the manifest, which reads all files, and those of the inputs that are here.

    Raises:
        ArtifactError: no such directory, none that orin-kit knows, or not whole: a file missing, cut or changed.
        UnsupportedModelError: a family, field or quantization that orin-kit does not know.
        UserError: `verify` without a manifest, or a context or prompt beyond the model's.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(f"no such directory: {directory}", mend="give a model or artifact directory")
    manifest = read_manifest(directory, verify=verify) if (directory / MANIFEST).is_file() else None
    if manifest is None and verify:
        raise UserError(f"{directory} has no {MANIFEST} to verify it by", mend="leave out --verify")
    kind = manifest.kind if manifest else _kind_without_manifest(directory)
    sizes = [file.stat().st_size for file in directory.rglob("*") if file.is_file()]
    found = Inspection(directory=str(directory), kind=kind, files=len(sizes), disk_bytes=sum(sizes))
    if manifest:
        found.made = _made(manifest, verify)
    if kind == "onnx":
        _look_at_onnx(found, directory, manifest)
    elif kind in CHECKPOINTS:
        _look_at_checkpoint(found, directory)
    else:
        found.contents = manifest.results if manifest else _demo(directory) or {}
    if found.model:
        spec = read_spec(directory)
        longest = found.model.max_len if kind == "onnx" else spec.max_position_embeddings
        at = _within("--context", context, 1024, longest), _within("--prompt-length", prompt_length, 128, longest)
        found.device, found.assumptions = AGX_ORIN_64GB.name, assumptions(AGX_ORIN_64GB, found.graph)
        settings = found.made.settings if found.made else {}
        found.predictions = predictions(spec, found.model, *at, exported=kind == "onnx", settings=settings)
    return found


def _kind_without_manifest(directory: Path) -> str:
    if (directory / ONNX_MODEL).is_file():
        return "onnx"
    if (directory / "config.json").is_file():
        weights = any(next(directory.glob(pattern), None) for pattern in WEIGHT_FILES)
        return "checkpoint" if weights else "config"
    if _demo(directory):
        return "demo"
    inside = sorted(file.parent.name for file in directory.glob(f"*/{MANIFEST}"))
    mend = f"give one of those in it: {', '.join(inside)}" if inside else "give a model or artifact directory"
    raise ArtifactError(f"{directory} is nothing that orin-kit reads or writes", mend=mend)


def _demo(directory: Path) -> dict[str, Any] | None:
    """What `orin-kit demo` sums up beside its artifacts; None where it did not."""
    try:
        summary = json.loads((directory / DEMO_SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(summary, dict) and {"made_by", "rows"} <= summary.keys()
    return summary if ours else None


def _made(manifest: Manifest, verify: bool) -> Made:
    inputs = {role: Input(**entry) for role, entry in manifest.inputs.items()}
    if verify:
        for entry in inputs.values():
            if Path(entry.path).exists():
                entry.now = "same" if sha256_input(entry.path) == entry.sha256 else "changed"
            else:
                entry.now = "not here"
    return Made(
        made_by=manifest.made_by, created=manifest.created, settings=manifest.settings, inputs=inputs,
        files=len(manifest.files), verified=verify,
    )  # fmt: skip


def _look_at_checkpoint(found: Inspection, directory: Path) -> None:
    spec = read_spec(directory)
    scheme = None if spec.quantization_config is None else read_format(spec.quantization_config)
    tensors = [] if found.kind == "config" else _stored(directory, spec, scheme)
    max_len = min(DEFAULT_MAX_LEN, spec.max_position_embeddings)
    has_scales = scheme is not None and any(tensor.part in CACHE_SCALES for tensor in tensors)
    one_table = found.made is not None and bool(found.made.settings.get("tied_table"))
    spec = replace(spec, tie_word_embeddings=spec.tie_word_embeddings or one_table)
    found.model = _model(spec, tensors, "I8" if has_scales else "F16", max_len)
    if scheme is not None:
        found.model.quantization = str((spec.quantization_config or {})["quant_method"])
    if tensors:
        found.mismatches += mismatches(tensors, found.model.kinds, spec, names=True)


def _stored(directory: Path, spec: DecoderSpec, scheme: Format | None) -> list[Tensor]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    source, expected = WeightSource(directory), spec.tensor_shapes()
    tensors = []
    for name in source.names:
        array = source.get(name)  # a view: nothing is read
        tensor = Tensor(name, names[array.dtype.type], array.shape, array.nbytes)
        module, _, part = name.rpartition(".")
        if scheme is not None and f"{module}.{scheme.weight_part}" in source:
            if part == scheme.weight_part:
                how = scheme.packing(source, module)  # reads zero points and order, where there are any
                codes = Codes(how.bits, how.group_size, how.has_zero_points, how.has_order)
                tensor = Tensor(f"{module}.{PACKED}", tensor.dtype, how.shape, tensor.bytes, codes)
            elif part in scheme.parts:
                tensor = replace(tensor, name=f"{module}.{scheme.parts[part]}")
            elif part == "bias" and name not in expected and not array.any():
                tensor = replace(tensor, name=f"{module}.{ZERO_BIAS}")
        tensors.append(tensor)
    return tensors


def _look_at_onnx(found: Inspection, directory: Path, manifest: Manifest | None) -> None:
    spec, onnx = read_spec(directory), read_onnx(directory / ONNX_MODEL)
    tensors, shared = stored_tensors(onnx, spec)
    if not any(tensor.module == HEAD for tensor in tensors) and any(t.codes and t.module == EMBEDDING for t in tensors):
        spec = replace(spec, tie_word_embeddings=True)  # a packed head makes config.json say that there are two
    settings = manifest.settings if manifest else {}
    tables = [tensor.shape[0] for tensor in tensors if tensor.name == "rotary.cos"]
    max_len = int(settings.get("max_len") or next(iter(tables), min(DEFAULT_MAX_LEN, spec.max_position_embeddings)))
    cache_dtype = next((value.dtype for value in caches(onnx)), "F16")
    found.model = model = _model(spec, tensors, cache_dtype, max_len)
    found.graph = graph_of(onnx, tensors, shared, spec, settings)
    found.mismatches += mismatches(tensors, model.kinds, spec, names=False)
    for what, prefix, said in (
        ("KV cache bytes a token", "past_key_values.", model.kv_bytes_per_token),
        ("convolution state bytes", "past_conv.", model.conv_state_bytes),
    ):
        held = sum(map(fixed_bytes, caches(onnx, prefix)))
        if held != said:
            found.mismatches.append(f"{what}: config.json says {said:,}, the graph's inputs {held:,}")


def _model(spec: DecoderSpec, tensors: Sequence[Tensor], cache_dtype: str, max_len: int) -> Model:
    kinds, packed = by_kind(tensors, spec), packings(tensors, spec)
    table = spec.vocab_size * spec.hidden_size
    return Model(
        family=spec.model_type,
        mixer="convolution" if spec.layout.mixer == "conv" else spec.layout.mixer,
        sizes={name: getattr(spec, name) for name in SIZES if getattr(spec, name)},
        traits=[name for name in TRAITS if getattr(spec, name)],
        quantization=None,
        tied=spec.tie_word_embeddings,
        parameters=spec.num_parameters,
        embedding_parameters=table,
        head_parameters=0 if spec.tie_word_embeddings else table,
        stored_parameters=sum(row.parameters for row in kinds) if tensors else None,
        group_size=packed[0].group_size if packed else None,
        packings=packed,
        kinds=kinds,
        weights_bytes=sum(row.bytes for row in kinds),
        token_bytes=sum(row.token_bytes for row in kinds),
        cache_dtype=cache_dtype,
        kv_bytes_per_token=spec.kv_bytes_per_token(VALUE_BYTES[cache_dtype]),
        kv_scale_bytes=sum(row.bytes for row in kinds if row.kind == "cache_scales"),
        conv_state_bytes=spec.conv_state_bytes(VALUE_BYTES[cache_dtype]),
        max_len=max_len,
    )


def _within(option: str, wanted: int | None, default: int, longest: int) -> int:
    if wanted is None:
        return min(default, longest)
    if not 1 <= wanted <= longest:
        what = f"{option} {wanted} is not between 1 and {longest}, the model's longest context"
        raise UserError(what, mend="choose one that is")
    return wanted
