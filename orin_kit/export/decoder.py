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

import onnx_ir as ir
from onnxscript import GraphBuilder

from orin_kit.export.dialect import FLOATS, Dialect, Graph
from orin_kit.export.tensors import DecoderTensors, Linear


def build_decoder(
    tensors: DecoderTensors, dialect: type[Dialect], *, activations: str, max_positions: int, embedding_bits: int = 16
) -> ir.Model:
    """Build the decoder of a checkpoint; weights are read when the model is saved.

    Args:
        tensors: the checkpoint.
        dialect: whose operators to use.
        activations: "fp32" or "fp16", also of the cache and of weights that are not packed.
        max_positions: the longest context.
        embedding_bits: 16 keeps the table as stored, 8 and 4 quantize it group-wise.
    """
    build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports=dict(dialect.opsets), name="decoder"))
    graph = Graph(build, tensors, FLOATS[activations], max_positions, embedding_bits)
    positions = build.input("logit_positions", ir.DataType.INT64, ["batch", "logits"])
    block = dialect(graph)
    spec = tensors.spec

    residual = block.embed(graph.ids)
    layout = spec.layout
    mix = {"attention": block.attention, "conv": block.conv}[layout.mixer]
    norms = [f"model.layers.{layer}.{layout.mixer_norm}" for layer in range(spec.num_hidden_layers)] + [layout.norm]
    x = block.norm(residual, norms[0])
    for layer in range(spec.num_hidden_layers):
        x = mix(block.linear(x, _linear(tensors, layer, *layout.mixer_in, together="qkv_proj")), layer)
        x = block.linear(x, _linear(tensors, layer, layout.mixer_out))
        x, residual = block.add_norm(x, residual, f"model.layers.{layer}.{layout.mlp_norm}")
        x = block.gate(block.linear(x, _linear(tensors, layer, layout.gate, layout.up, together="gate_up_proj")))
        x = block.linear(x, _linear(tensors, layer, layout.down))
        x, residual = block.add_norm(x, residual, norms[layer + 1])

    wanted = graph.op.GatherND(x, graph.op.Unsqueeze(positions, [2]), batch_dims=1)
    logits = graph.op.Cast(block.linear(wanted, tensors.head()), to=ir.DataType.FLOAT)
    logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "logits", spec.vocab_size])
    build.add_output(logits, "logits")
    _logits_first(build.graph)
    return ir.Model(build.graph, ir_version=10, producer_name="orin-kit")


def _linear(tensors: DecoderTensors, layer: int, *parts: str, together: str = "") -> Linear:
    """A layer's linear, or several side by side, called `together` in the graph."""
    shapes = [tensors.spec.linear_shapes()[part] for part in parts]
    prefix = f"model.layers.{layer}"
    name = parts[0] if len(parts) == 1 else f"{parts[0].rpartition('.')[0]}.{together}"
    return tensors.linear(
        f"{prefix}.{name}",
        *(f"{prefix}.{part}" for part in parts),
        out_features=sum(out for out, _ in shapes),
        in_features=shapes[0][1],
    )


def _logits_first(graph: ir.Graph) -> None:
    outputs = list(graph.outputs)
    graph.outputs.clear()
    graph.outputs.extend([outputs[-1], *outputs[:-1]])
