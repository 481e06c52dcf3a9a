"""Blocks that several dialects say in the same standard operators."""

from __future__ import annotations

import onnx_ir as ir

from orin_kit.export.dialect import Graph


def silu_gate(graph: Graph, gate_up: ir.Value) -> ir.Value:
    """`silu(gate) * up` of the two halves."""
    op = graph.op
    gate, up = op.several("Split", 2, gate_up, num_outputs=2, axis=-1)
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


def conv(graph: Graph, bcx: ir.Value, layer: int) -> ir.Value:
    """See `Dialect.conv`: the state and the new inputs end to end, convolved."""
    op = graph.op
    b, c, x = op.several("Split", 3, bcx, num_outputs=3, axis=-1)
    past = op.Transpose(graph.conv_state(layer), perm=[0, 2, 1])
    seen = op.Concat(past, op.Mul(b, x), axis=1)  # [batch, state + sequence, hidden]
    weight, bias = graph.conv_weight(layer)
    convolved = op.Conv(op.Transpose(seen, perm=[0, 2, 1]), weight, bias, group=graph.spec.hidden_size)
    state = op.GatherND(seen, graph.state_positions, batch_dims=1)
    graph.output_conv_state(layer, op.Transpose(state, perm=[0, 2, 1]))
    return op.Mul(c, op.Transpose(convolved, perm=[0, 2, 1]))
