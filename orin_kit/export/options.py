"""What a decoder's graph can be beside the plain one."""

from __future__ import annotations

from dataclasses import dataclass

# What `export` does when it is not told. Here because `inspect` says it too, without the exporter's packages.
DEFAULT_MAX_LEN = 4096  # the longest context, where the model's own is not shorter
DEFAULT_GROUP = 128  # input features that share a scale, of a plain checkpoint rounded to int4
EMBEDDING_GROUP = 32  # features of an embedding row that share a scale, of a table of its own


@dataclass(frozen=True)
class GraphOptions:
    """Choices that every dialect reads from its `Graph`. The defaults add nothing to the graph.

    Attributes:
        tied_table: the embedding is read from the packed head's own bytes; it must have been quantized so.
        kv_bits: of the KV cache: 16 has the activations' dtype, 8 is int8 with the checkpoint's scales.
        accuracy_level: onnxruntime's `MatMulNBits`: 4 quantizes activations to int8 block by block, 0 never does.
        kv_update: of the `trt_native` dialect, how new tokens get into the cache: "select" or "layer" (see there).
        lora_targets: linears that take an adapter as inputs of the graph, by the last part of their names ("q_proj").
    """

    tied_table: bool = False
    kv_bits: int = 16
    accuracy_level: int = 4
    kv_update: str = "select"
    lora_targets: tuple[str, ...] = ()
