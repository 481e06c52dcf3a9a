"""The one decoder graph: prefill and decode of every supported family, said through a dialect.

Inputs: `input_ids` int64 `[batch, sequence]`; `past_lengths` int64 `[batch]`, the tokens that each row's cache holds;
`logit_positions` int64 `[batch, n]`, where in the sequence logits are wanted; the caches. Outputs: `logits`, fp32
`[batch, n, vocab]`, and the updated caches. A row shorter than the others is padded on its right: what the padding
writes into the cache lies behind the row's length and is overwritten by its next tokens.

A layer that convolves keeps a state instead, the last inputs of its convolution. It has no place behind the row's
length to let padding write to, so such graphs have one more input: `input_lengths` int64 `[batch]`, the tokens of
each row that are no padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnxscript import GraphBuilder

from orin_kit.export.dialect import FLOATS, Dialect, Graph
from orin_kit.export.options import GraphOptions
from orin_kit.export.tensors import DecoderTensors, Linear
from orin_kit.models.fused import fused_linears, fused_shape, lora_names

PLAIN = GraphOptions()


def build_decoder(
    tensors: DecoderTensors,
    dialect: type[Dialect],
    *,
    activations: str,
    max_positions: int,
    embedding_bits: int = 16,
    options: GraphOptions = PLAIN,
) -> ir.Model:
    """Build the decoder of a checkpoint; weights are read when the model is saved.

    Args:
        tensors: the checkpoint.
        dialect: whose operators to use.
        activations: "fp32", "fp16" or "bf16", also of the cache and of weights that are not packed.
        max_positions: the longest context.
        embedding_bits: 16 keeps the table as stored, 8 and 4 quantize it group-wise.
        options: the rest; see `GraphOptions`.
    """
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports=dict(dialect.opsets), name="decoder"))
    graph = Graph(build, tensors, FLOATS[activations], max_positions, embedding_bits, options)
    positions = build.input("logit_positions", ir.DataType.INT64, ["batch", "logits"])
    block = dialect(graph)
    spec = tensors.spec

    residual = block.embed(graph.ids)
    layout = spec.layout
    mix = {"attention": block.attention, "conv": block.conv}[layout.mixer]
    norms = [f"model.layers.{layer}.{layout.mixer_norm}" for layer in range(spec.num_hidden_layers)] + [layout.norm]
    x = block.norm(residual, norms[0])
    for layer in range(spec.num_hidden_layers):
        linears = iter(_linears(tensors, layer))
        x = mix(_adapted(block, graph, x, next(linears)), layer)
        x = _adapted(block, graph, x, next(linears))
        x, residual = block.add_norm(x, residual, f"model.layers.{layer}.{layout.mlp_norm}")
        x = _gated(block, graph, x, next(linears))
        x = _adapted(block, graph, x, next(linears))
        x, residual = block.add_norm(x, residual, norms[layer + 1])

    wanted = graph.op.GatherND(x, graph.op.Unsqueeze(positions, [2]), batch_dims=1)
    logits = graph.op.Cast(block.linear(wanted, tensors.head()), to=ir.DataType.FLOAT)
    logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "logits", spec.vocab_size])
    build.add_output(logits, "logits")
    _logits_first(build.graph)
    return ir.Model(build.graph, ir_version=10, producer_name="orin-kit")


def _linears(tensors: DecoderTensors, layer: int) -> Iterator[Linear]:
    """A layer's linears in order of use: into the mixer, out of it, gate and up, down."""
    prefix = f"model.layers.{layer}"
    for name, parts in fused_linears(tensors.spec.layout).items():
        rows, columns = fused_shape(tensors.spec, parts)
        names = [f"{prefix}.{part}" for part in parts]
        yield tensors.linear(f"{prefix}.{name}", *names, out_features=rows, in_features=columns)


def _adapted(block: Dialect, graph: Graph, x: ir.Value, linear: Linear) -> ir.Value:
    """A linear, and what a LoRA adapter adds to it where it may: `x A B`, inputs `[in, rank]` and `[rank, out]`.

    An input of rank 0 adds nothing. Adapters of parts side by side are side by side in A, and in B each fills the rows
    of its rank and the columns of its part (https://arxiv.org/abs/2106.09685; `runtime/lora.py` makes them).
    """
    y = block.linear(x, linear)
    if not _has_adapter(graph, linear):
        return y
    rank = f"rank.{linear.name}"
    down, up = lora_names(linear.name)
    a = graph.build.input(down, graph.dtype, [linear.in_features, rank])
    b = graph.build.input(up, graph.dtype, [rank, linear.out_features])
    return graph.op.Add(y, graph.op.MatMul(graph.op.MatMul(x, a), b))


def _gated(block: Dialect, graph: Graph, x: ir.Value, linear: Linear) -> ir.Value:
    """Gate and up and what becomes of them; an adapter comes in between."""
    return block.gate(_adapted(block, graph, x, linear)) if _has_adapter(graph, linear) else block.gated(x, linear)


def _has_adapter(graph: Graph, linear: Linear) -> bool:
    return bool({part.rpartition(".")[2] for part in linear.parts} & set(graph.options.lora_targets))


def _logits_first(graph: ir.Graph) -> None:
    outputs = list(graph.outputs)
    graph.outputs.clear()
    graph.outputs.extend([outputs[-1], *outputs[:-1]])
