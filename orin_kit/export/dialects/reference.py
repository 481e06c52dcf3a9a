"""Standard ONNX operators only (opset 24): what onnx.reference runs and every other dialect is compared with.

https://onnx.ai/onnx/operators/ (Attention-24, TensorScatter-24, RotaryEmbedding-23, RMSNormalization-23)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from orin_kit.errors import UserError
from orin_kit.export.dialect import Graph
from orin_kit.export.tensors import Linear
from orin_kit.models.spec import EMBEDDING


class ReferenceDialect:
    """See `Dialect`. Plain and slow: the mask is explicit and covers the whole cache."""

    opsets: Mapping[str, int] = MappingProxyType({"": 24})

    def __init__(self, graph: Graph) -> None:
        self.graph, self.op = graph, graph.op
        if graph.embedding_bits != 16:
            raise UserError("the reference dialect keeps the embedding as it is", mend="use --embedding-bits 16")
        op = self.op
        steps = op.Range(0, op.Squeeze(op.Shape(graph.ids, start=1, end=2), [0]), 1)
        self.positions = op.Add(op.Unsqueeze(graph.past, [1]), op.Unsqueeze(steps, [0]))  # [batch, sequence]
        self.mask: ir.Value | None = None

    def embed(self, ids: ir.Value) -> ir.Value:
        return self.op.Cast(self.op.Gather(self.graph.embedding_table(), ids), to=self.graph.dtype)

    def norm(self, x: ir.Value, weight: str) -> ir.Value:
        return self._rms(x, weight, self.graph.spec.hidden_size)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        total = self.op.Add(x, residual)
        return self.norm(total, weight), total

    def linear(self, x: ir.Value, linear: Linear) -> ir.Value:
        graph = self.graph
        if linear.group_size is not None:
            weight = self.op.Transpose(self._dequantized(linear, linear.group_size), perm=[1, 0])
        elif linear.parts == (EMBEDDING,):
            weight = self.op.Transpose(graph.embedding_table(), perm=[1, 0])
        else:
            weight = graph.dense_weight(linear)
        y = self.op.MatMul(x, weight)
        bias = graph.bias(linear)
        return y if bias is None else self.op.Add(y, bias)

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        graph, spec, op = self.graph, self.graph.spec, self.op
        sizes = graph.constant([spec.q_size, spec.kv_size, spec.kv_size])
        query, key, value = op.several("Split", 3, qkv, sizes, axis=-1)
        name = f"model.layers.{layer}.self_attn"
        query = self._rotate(self._heads(query, spec.num_attention_heads), f"{name}.q_norm")
        key = self._rotate(self._heads(key, spec.num_key_value_heads), f"{name}.k_norm")
        past_key, past_value = graph.cache(layer)
        keys = op.TensorScatter(past_key, key, graph.past, axis=2)
        heads = op.Transpose(self._heads(value, spec.num_key_value_heads), perm=[0, 2, 1, 3])
        values = op.TensorScatter(past_value, heads, graph.past, axis=2)
        graph.output_cache(layer, keys, values)
        out = op.Attention(query, keys, values, self._mask(past_key))
        return op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), [0, 0, spec.q_size])

    def conv(self, bcx: ir.Value, layer: int) -> ir.Value:
        graph, op = self.graph, self.op
        b, c, x = op.several("Split", 3, bcx, num_outputs=3, axis=-1)
        past = op.Transpose(graph.conv_state(layer), perm=[0, 2, 1])
        seen = op.Concat(past, op.Mul(b, x), axis=1)  # [batch, state + sequence, hidden]
        weight, bias = graph.conv_weight(layer)
        convolved = op.Conv(op.Transpose(seen, perm=[0, 2, 1]), weight, bias, group=graph.spec.hidden_size)
        state = op.GatherND(seen, graph.state_positions, batch_dims=1)
        graph.output_conv_state(layer, op.Transpose(state, perm=[0, 2, 1]))
        return op.Mul(c, op.Transpose(convolved, perm=[0, 2, 1]))

    def gate(self, gate_up: ir.Value) -> ir.Value:
        gate, up = self.op.several("Split", 2, gate_up, num_outputs=2, axis=-1)
        return self.op.Mul(self.op.Mul(gate, self.op.Sigmoid(gate)), up)

    def _rms(self, x: ir.Value, weight: str, features: int) -> ir.Value:
        scale = self.graph.norm_weight(weight, features)
        return self.op.RMSNormalization(x, scale, axis=-1, epsilon=self.graph.spec.rms_norm_eps)

    def _heads(self, x: ir.Value, heads: int) -> ir.Value:
        """`[batch, sequence, heads * head_dim]` -> `[batch, sequence, heads, head_dim]`."""
        return self.op.Reshape(x, [0, 0, heads, self.graph.spec.head_dim])

    def _rotate(self, heads: ir.Value, norm: str) -> ir.Value:
        """Norm (Qwen3) and rotate; `[batch, sequence, heads, head_dim]` -> `[batch, heads, sequence, head_dim]`."""
        if self.graph.spec.qk_norm:
            heads = self._rms(heads, norm, self.graph.spec.head_dim)
        cos, sin = self.graph.rotary_tables()
        return self.op.RotaryEmbedding(self.op.Transpose(heads, perm=[0, 2, 1, 3]), cos, sin, self.positions)

    def _mask(self, cache: ir.Value) -> ir.Value:
        """Bool `[batch, 1, sequence, max_len]`: a position sees itself and what came before it."""
        if self.mask is None:
            op = self.op
            slots = op.Range(0, op.Squeeze(op.Shape(cache, start=2, end=3), [0]), 1)
            self.mask = op.Unsqueeze(op.GreaterOrEqual(op.Unsqueeze(self.positions, [2]), slots), [1])
        return self.mask

    def _dequantized(self, linear: Linear, group_size: int) -> ir.Value:
        """`[out, in]` from signed INT4 and its group scales."""
        graph, n, k = self.graph, linear.out_features, linear.in_features
        q = graph.weight(
            f"{linear.name}.weight_packed",
            (n, k),
            lambda: graph.tensors.packed(linear)[0].view(np.uint8) ^ 0x88,  # offset 8 to two's complement
            ir.DataType.INT4,
        )
        scales = graph.weight(
            f"{linear.name}.weight_scale", (n, k // group_size), lambda: graph.tensors.packed(linear)[1]
        )
        return self.op.DequantizeLinear(q, scales, axis=1, block_size=group_size)
