"""`orin-kit inspect`: what a directory is, read from headers and manifests; no weight is loaded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orin_kit.errors import ArtifactError, UserError
from orin_kit.inspect.inspection import Graph, Initializers, Input, Inspection, Made, Model, Port
from orin_kit.inspect.onnx_file import VALUE_BYTES, OnnxFile, Value, external_files, read_onnx
from orin_kit.inspect.predict import assumptions, predictions
from orin_kit.inspect.tensors import PACKED, SCALE, Tensor, bits_of, by_kind, kind_of, mismatches
from orin_kit.manifest import MANIFEST, ONNX_MODEL, Manifest, read_manifest, sha256_input
from orin_kit.models.spec import EMBEDDING, DecoderSpec, read_spec
from orin_kit.profile.roofline import AGX_ORIN_64GB

EXPORT_MAX_LEN = 4096  # export's default, where the model's own context is not shorter
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
    """Say what a directory is: a checkpoint, plain or INT4, an ONNX artifact, or anything else orin-kit writes.

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
        found.device, found.assumptions = AGX_ORIN_64GB.name, assumptions(AGX_ORIN_64GB)
        found.predictions = predictions(spec, found.model, *at, exported=kind == "onnx")
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
    tensors = [] if found.kind == "config" else _stored(directory, spec)
    max_len = min(EXPORT_MAX_LEN, spec.max_position_embeddings)
    found.model = _model(spec, tensors, "F16", max_len)
    if tensors:
        found.mismatches += mismatches(tensors, found.model.kinds, spec, names=True)


def _stored(directory: Path, spec: DecoderSpec) -> list[Tensor]:
    from orin_kit.models.formats.registry import read_format
    from orin_kit.models.weights import DTYPES as STORED  # with ml_dtypes, which ONNX artifacts do without
    from orin_kit.models.weights import WeightSource

    names = {dtype: name for name, dtype in STORED.items()}
    scheme = None if spec.quantization_config is None else read_format(spec.quantization_config)
    source = WeightSource(directory)
    tensors = []
    for name in source.names:
        array = source.get(name)  # a view: nothing is read
        tensor = Tensor(name, names[array.dtype.type], array.shape, array.nbytes)
        module, _, part = name.rpartition(".")
        if scheme is not None and part in scheme.parts and f"{module}.{scheme.weight_part}" in source:
            packing = scheme.packing(source, module)
            shape = packing.shape if part == scheme.weight_part else tensor.shape
            bits = packing.bits if part == scheme.weight_part else None
            tensor = Tensor(f"{module}.{scheme.parts[part]}", tensor.dtype, shape, tensor.bytes, bits)
        tensors.append(tensor)
    return tensors


def _look_at_onnx(found: Inspection, directory: Path, manifest: Manifest | None) -> None:
    spec, onnx = read_spec(directory), read_onnx(directory / ONNX_MODEL)
    tensors = [Tensor(i.name, i.dtype, i.shape, i.bytes) for i in onnx.initializers]
    settings = manifest.settings if manifest else {}
    tables = [tensor.shape[0] for tensor in tensors if tensor.name == "rotary.cos"]
    max_len = int(settings.get("max_len") or next(iter(tables), min(EXPORT_MAX_LEN, spec.max_position_embeddings)))
    caches = [value for value in onnx.inputs if value.name.startswith(("past_key_values.", "past_conv."))]
    cache_dtype = caches[0].dtype if caches else "F16"
    found.model = model = _model(spec, tensors, cache_dtype, max_len)
    found.graph = _graph(onnx, tensors, spec, settings)
    found.mismatches += mismatches(tensors, model.kinds, spec, names=False)
    for what, prefix, said in (
        ("KV cache bytes a token", "past_key_values.", model.kv_bytes_per_token),
        ("convolution state bytes", "past_conv.", model.conv_state_bytes),
    ):
        held = sum(_fixed_bytes(value) for value in caches if value.name.startswith(prefix))
        if held != said:
            found.mismatches.append(f"{what}: config.json says {said:,}, the graph's inputs {held:,}")


def _fixed_bytes(value: Value) -> int:
    """Bytes of an input whose named dimensions are 1."""
    return VALUE_BYTES[value.dtype] * math.prod(size for size in value.shape if isinstance(size, int))


def _graph(onnx: OnnxFile, tensors: Sequence[Tensor], spec: DecoderSpec, settings: dict[str, Any]) -> Graph:
    ops: dict[str, dict[str, int]] = {}
    for (domain, op), count in sorted(onnx.ops.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        ops.setdefault(domain or "ai.onnx", {})[op] = count
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        key = kind_of(tensor.name, spec), tensor.dtype
        counts[key] += 1
        sizes[key] += tensor.bytes
    return Graph(
        producer=onnx.producer,
        ir_version=onnx.ir_version,
        dialect=str(settings.get("dialect") or ("ort" if "com.microsoft" in onnx.opsets else "reference")),
        opsets={domain or "ai.onnx": version for domain, version in onnx.opsets.items()},
        ops=ops,
        inputs=[_port(value) for value in onnx.inputs],
        outputs=[_port(value) for value in onnx.outputs],
        initializers=[Initializers(kind=k, dtype=d, count=counts[k, d], bytes=sizes[k, d]) for k, d in sorted(counts)],
        external_files=external_files(onnx),
    )


def _port(value: Value) -> Port:
    return Port(name=value.name, dtype=value.dtype, shape=list(value.shape))


def _model(spec: DecoderSpec, tensors: Sequence[Tensor], cache_dtype: str, max_len: int) -> Model:
    kinds = by_kind(tensors, spec)
    table = spec.vocab_size * spec.hidden_size
    return Model(
        family=spec.model_type,
        mixer="convolution" if spec.layout.mixer == "conv" else spec.layout.mixer,
        sizes={name: getattr(spec, name) for name in SIZES if getattr(spec, name)},
        traits=[name for name in TRAITS if getattr(spec, name)],
        tied=spec.tie_word_embeddings,
        parameters=spec.num_parameters,
        embedding_parameters=table,
        head_parameters=0 if spec.tie_word_embeddings else table,
        stored_parameters=sum(row.parameters for row in kinds) if tensors else None,
        group_size=_group_size(tensors, spec),
        kinds=kinds,
        weights_bytes=sum(row.bytes for row in kinds),
        token_bytes=sum(row.token_bytes for row in kinds),
        cache_dtype=cache_dtype,
        kv_bytes_per_token=spec.kv_bytes_per_token(VALUE_BYTES[cache_dtype]),
        conv_state_bytes=spec.conv_state_bytes(VALUE_BYTES[cache_dtype]),
        max_len=max_len,
    )


def _group_size(tensors: Sequence[Tensor], spec: DecoderSpec) -> int | None:
    """Of the first packed linear: its weights for each of its scales."""
    scales = {t.module: math.prod(t.shape) for t in tensors if t.part == SCALE and t.module != EMBEDDING}
    packed = (t for t in tensors if t.part == PACKED and scales.get(t.module))
    return next((8 * t.bytes // bits_of(t, spec) // scales[t.module] for t in packed), None)


def _within(option: str, wanted: int | None, default: int, longest: int) -> int:
    if wanted is None:
        return min(default, longest)
    if not 1 <= wanted <= longest:
        what = f"{option} {wanted} is not between 1 and {longest}, the model's longest context"
        raise UserError(what, mend="choose one that is")
    return wanted
