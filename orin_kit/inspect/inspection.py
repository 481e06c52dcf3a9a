"""What `orin-kit inspect` found, as data; `--json` prints this, field by field."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, Field

from orin_kit.inspect.tensors import KindBytes, Packing
from orin_kit.profile.roofline import Span

SCHEMA: Final = "orin-kit/inspect/1"


class Input(BaseModel):
    """What the artifact was made from; `now` is "same", "changed", "not here", or "not checked" without `--verify`."""

    path: str
    sha256: str
    now: str = "not checked"


class Made(BaseModel):
    """Who made it, as its manifest says; `verified`: every file's sha256 was compared (sizes always are)."""

    made_by: str
    created: str
    settings: dict[str, Any]
    inputs: dict[str, Input]
    files: int
    verified: bool


class Model(BaseModel):
    """The decoder.

    Attributes:
        sizes: the config's own numbers; those that are 0 are left out.
        traits: what else it has: "qkv_bias", "qk_norm", ...
        quantization: the format of a checkpoint's packed weights, as its config.json calls it.
        tied: head and embedding are one table, by the config, or because `quantize` or `export` made one packed table.
        parameters, embedding_parameters, head_parameters: by the config; a tied table counts once, as the embedding.
        stored_parameters: counted in the files; None where there are no weights.
        group_size: input features that share a scale, of the layers' packed linears.
        packings: the ways in which weights are packed; empty where all are plain.
        kinds: the stored tensors by what they are for.
        weights_bytes, token_bytes: of all tensors; of those that one decoded token must read.
        cache_dtype: of the cache or state, the graph's own; of checkpoints what they are taken to be run with, "I8"
            where they hold the scales for it, else "F16".
        kv_bytes_per_token: bytes that a token of context costs; 0 for convolutions.
        kv_scale_bytes: of an int8 cache's scales, the same at any length.
        conv_state_bytes: of one row's convolution states at any length; 0 for attention.
        max_len: tokens the cache is reserved for; the export's own, or what export would choose.
    """

    family: str
    mixer: str
    sizes: dict[str, int]
    traits: list[str]
    quantization: str | None
    tied: bool
    parameters: int
    embedding_parameters: int
    head_parameters: int
    stored_parameters: int | None
    group_size: int | None
    packings: list[Packing]
    kinds: list[KindBytes]
    weights_bytes: int
    token_bytes: int
    cache_dtype: str
    kv_bytes_per_token: int
    kv_scale_bytes: int
    conv_state_bytes: int
    max_len: int


class Port(BaseModel):
    """An input or output of the graph."""

    name: str
    dtype: str
    shape: list[int | str]


class Initializers(BaseModel):
    """The graph's weights of one kind and type."""

    kind: str
    dtype: str
    count: int
    bytes: int


class Adapters(BaseModel):
    """What LoRA adapters may change at run time; their ranks are their own.

    Attributes:
        targets: linears by the last part of their names; q, k and v share inputs, so one of them brings all.
        linears: of the graph, that take an adapter.
        dtype: of their inputs.
        bytes_per_rank: of an adapter with rank 1 at every such linear; read for every token, and not in any prediction.
    """

    targets: list[str]
    linears: int
    dtype: str
    bytes_per_rank: int


class Graph(BaseModel):
    """The ONNX graph; domains by name, the standard one as "ai.onnx".

    Attributes:
        initializers: those that are `shared` left out.
        shared: initializers that are other initializers' bytes -> whose.
        adapters: None where the graph takes none.
        external_files: name -> bytes it must have; a file that lacks some ends the command.
        copies_cache: the keys and values are not written in place.
    """

    producer: str
    ir_version: int
    dialect: str
    opsets: dict[str, int]
    ops: dict[str, dict[str, int]]
    inputs: list[Port]
    outputs: list[Port]
    initializers: list[Initializers]
    shared: dict[str, str]
    adapters: Adapters | None
    external_files: dict[str, int]
    copies_cache: bool


class Prediction(BaseModel):
    """One form of the model on the device, batch 1; predicted, never measured.

    Attributes:
        form: "as stored", or what `quantize` and `export` would make of it.
        decode_bytes: read for one token at `context`: weights, cache, states.
        memory_bytes: weights, and the cache reserved for `max_len` tokens; the process itself is not counted.
        fits: within the memory target.
    """

    form: str
    context: int
    prompt_length: int
    weights_bytes: int
    decode_bytes: int
    tpot: Span
    ttft: Span
    memory_bytes: int
    memory_target_bytes: int
    fits: bool
    measured: Literal[False] = False


class Inspection(BaseModel):
    """A directory.

    Attributes:
        kind: of its manifest, or "checkpoint", "config" (a checkpoint without weights), "onnx", "demo" without one.
        files, disk_bytes: of the directory, files below it among them.
        mismatches: what contradicts itself, a line each.
        assumptions: behind the predictions, a line each.
        contents: of what holds no decoder: what its manifest calls results.
    """

    schema_: Literal["orin-kit/inspect/1"] = Field(default=SCHEMA, alias="schema")
    directory: str
    kind: str
    files: int
    disk_bytes: int
    made: Made | None = None
    model: Model | None = None
    graph: Graph | None = None
    mismatches: list[str] = []
    device: str | None = None
    predictions: list[Prediction] = []
    assumptions: list[str] = []
    contents: dict[str, Any] = {}
