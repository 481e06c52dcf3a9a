"""LoRA adapters as PEFT saves them, made into the inputs of a graph exported with `--lora-targets`.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. Neither torch nor peft is needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError, UnsupportedModelError, UserError
from orin_kit.models.fused import fused_linears, lora_names
from orin_kit.models.spec import DecoderSpec

if TYPE_CHECKING:
    from orin_kit.models.weights import WeightSource

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR = re.compile(r"(?P<layer>model\.layers\.\d+)\.(?P<linear>.+)\.lora_(?P<side>[AB])\.weight")
# Fields of adapter_config.json that do not change what a stored adapter computes, or that are read here.
HARMLESS = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "kasa_config", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
# Ways to begin that leave the base weights alone; the others (PiSSA, OLoRA, ...) need a base of their own.
BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter for one decoder.

    Attributes:
        directory: where it came from.
        inputs: of the graph, for every linear that the adapter changes: A fp32 `[in, rank]`, B fp32 `[rank, out]`, the
            scale within B.
    """

    directory: Path
    inputs: Mapping[str, NDArray[np.float32]]


def load_adapter(directory: str | Path, spec: DecoderSpec) -> Adapter:
    """Read a PEFT adapter directory for a decoder.

    Raises:
        ArtifactError: files are missing or broken, or tensors have other shapes than the decoder's.
        UnsupportedModelError: it is not plain LoRA (DoRA, trained biases or embeddings, ...); the field is named.
    """
    from orin_kit.models.weights import WeightSource  # with ml_dtypes, which a model without adapters does without

    directory = Path(directory)
    config = _read_config(directory)
    source = WeightSource(directory, WEIGHTS)
    found = _pairs(source)
    layers = [f"model.layers.{layer}" for layer in range(spec.num_hidden_layers)]
    strange = found.keys() - {(layer, name) for layer in layers for name in spec.linear_shapes()}
    if strange:
        name = ".".join(min(strange))
        raise ArtifactError(f"{directory} adapts {name}, which the model does not have", mend=_mend(config))
    inputs: dict[str, NDArray[np.float32]] = {}
    for layer in layers:
        for name, parts in fused_linears(spec.layout).items():
            pairs = [_scaled(source, config, f"{layer}.{part}", spec, found.get((layer, part))) for part in parts]
            down, up = _side_by_side(pairs)
            if down.shape[1]:
                inputs |= zip(lora_names(f"{layer}.{name}"), (down, up), strict=True)
    return Adapter(directory, inputs)


def check_fits(adapter: Adapter, inputs: Collection[str]) -> None:
    """Say that a graph with these inputs cannot take an adapter.

    Raises:
        UserError: it changes a linear that the graph has no input for.
    """
    missing = sorted(name for name in adapter.inputs if name not in inputs)
    if missing:
        linear = missing[0].partition(".")[2]
        what = f"{adapter.directory} adapts {linear}, but the model was exported without adapters for it"
        raise UserError(what, mend="export again with --lora-targets all")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise ArtifactError(f"no {CONFIG} in {directory}", mend="give a directory that PEFT's save_pretrained wrote")
    try:
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}", mend="copy the adapter again") from error
    mend = "merge the adapter into its model and export that"
    if config.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'", mend=mend)
    for field in sorted(set(config) - HARMLESS):
        if config[field] not in (None, False, [], {}, "none"):
            raise UnsupportedModelError(f"{path}: {field} = {config[field]!r} is not supported", mend=mend)
    if config.get("init_lora_weights") not in BEGINNINGS:
        what = f"{path}: init_lora_weights = {config['init_lora_weights']!r} changes the base model"
        raise UnsupportedModelError(what, mend="save it with path_initial_model_for_weight_conversion")
    return config


def _pairs(source: WeightSource) -> dict[tuple[str, str], dict[str, str]]:
    """`(layer, linear)` -> the tensors' names by side, "A" and "B"."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in source.names:
        match = TENSOR.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            what = f"{source.directory}: {name} is no LoRA weight of a decoder layer"
            raise UnsupportedModelError(what, mend="merge the adapter into its model and export that")
        found.setdefault((match["layer"], match["linear"]), {})[match["side"]] = name
    return found


def _scaled(
    source: WeightSource, config: dict[str, Any], linear: str, spec: DecoderSpec, sides: dict[str, str] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A `[in, rank]` and B `[rank, out]` times its scale, of one part; of rank 0 where it has no adapter."""
    rows, columns = spec.linear_shapes()[linear.split(".", 3)[3]]
    if sides is None:
        return np.zeros((columns, 0), np.float32), np.zeros((0, rows), np.float32)
    if len(sides) != 2:
        raise ArtifactError(f"{source.directory}: {linear} lacks lora_A or lora_B", mend="copy the adapter again")
    a, b = source.float32(sides["A"]), source.float32(sides["B"])
    rank = int(_pattern(config.get("rank_pattern"), linear, config.get("r", 0)))
    if a.shape != (rank, columns) or b.shape != (rows, rank):
        what = (
            f"{source.directory}: {linear} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
            f"the model wants {[rank, columns]} and {[rows, rank]}"
        )
        raise ArtifactError(what, mend=_mend(config))
    alpha = float(_pattern(config.get("alpha_pattern"), linear, config.get("lora_alpha", 0)))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return a.T, b.T * np.float32(scale)


def _pattern(patterns: dict[str, Any] | None, linear: str, default: Any) -> Any:
    """The value of the first pattern that ends a linear's name, as `peft.utils.other.get_pattern_key` matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", linear):
            return value
    return default


def _side_by_side(
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The adapters of parts side by side: A next to A, and B block by block along the diagonal."""
    down = np.ascontiguousarray(np.concatenate([a for a, _ in pairs], axis=1))
    up = np.zeros((down.shape[1], sum(b.shape[1] for _, b in pairs)), np.float32)
    row = column = 0
    for _, b in pairs:
        up[row : row + b.shape[0], column : column + b.shape[1]] = b
        row, column = row + b.shape[0], column + b.shape[1]
    return down, up


def _mend(config: dict[str, Any]) -> str:
    return f"use an adapter of this very model; it was made for {config.get('base_model_name_or_path')}"
