"""The one decoder graph: prefill and decode of every supported family, said through a dialect.

Inputs: `input_ids` int64 `[batch, sequence]`; `past_lengths` int64 `[batch]`, the tokens that each row's cache holds;
`logit_positions` int64 `[batch, n]`, where in the sequence logits are wanted; the caches. Outputs: `logits`, fp32
`[batch, n, vocab]`, and the updated caches. A row shorter than the others is padded on its right: what the padding
writes into the cache lies behind the row's length and is overwritten by its next tokens.
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
    x = block.norm(residual, "model.layers.0.input_layernorm")
    for layer in range(spec.num_hidden_layers):
        name = f"model.layers.{layer}"
        last = layer + 1 == spec.num_hidden_layers
        x = block.attention(block.linear(x, _linear(tensors, layer, "qkv_proj", "q_proj", "k_proj", "v_proj")), layer)
        x = block.linear(x, _linear(tensors, layer, "o_proj", "o_proj"))
        x, residual = block.add_norm(x, residual, f"{name}.post_attention_layernorm")
        x = block.gate(block.linear(x, _linear(tensors, layer, "gate_up_proj", "gate_proj", "up_proj")))
        x = block.linear(x, _linear(tensors, layer, "down_proj", "down_proj"))
        x, residual = block.add_norm(x, residual, "model.norm" if last else f"model.layers.{layer + 1}.input_layernorm")

    wanted = graph.op.GatherND(x, graph.op.Unsqueeze(positions, [2]), batch_dims=1)
    logits = graph.op.Cast(block.linear(wanted, tensors.head()), to=ir.DataType.FLOAT)
    logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "logits", spec.vocab_size])
    build.add_output(logits, "logits")
    _logits_first(build.graph)
    return ir.Model(build.graph, ir_version=10, producer_name="orin-kit")


def _linear(tensors: DecoderTensors, layer: int, name: str, *parts: str) -> Linear:
    shapes = {path.split(".")[1]: (path, shape) for path, shape in tensors.spec.linear_shapes().items()}
    paths = [shapes[part][0] for part in parts]
    prefix = f"model.layers.{layer}"
    return tensors.linear(
        f"{prefix}.{paths[0].split('.')[0]}.{name}",
        *(f"{prefix}.{path}" for path in paths),
        out_features=sum(shapes[part][1][0] for part in parts),
        in_features=shapes[parts[0]][1][1],
    )


def _logits_first(graph: ir.Graph) -> None:
    outputs = list(graph.outputs)
    graph.outputs.clear()
    graph.outputs.extend([outputs[-1], *outputs[:-1]])
