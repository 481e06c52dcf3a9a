"""Standard ONNX operators only (opset 24): what onnx.reference runs and every other dialect is compared with.

https://onnx.ai/onnx/operators/ (Attention-24, TensorScatter-24, RotaryEmbedding-23, RMSNormalization-23)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from orin_kit.errors import UserError
from orin_kit.export import standard
from orin_kit.export.dialect import Graph
from orin_kit.export.tensors import Linear
from orin_kit.models.spec import EMBEDDING


class ReferenceDialect:
    """See `Dialect`. Plain and slow: the mask is explicit and covers the whole cache."""

    opsets: Mapping[str, int] = MappingProxyType({"": 24})
    ties = False

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
        key_scale, value_scale = graph.kv_scales(layer) or (None, None)
        heads = op.Transpose(self._heads(value, spec.num_key_value_heads), perm=[0, 2, 1, 3])
        present_key, keys = self._extend(past_key, key, key_scale)
        present_value, values = self._extend(past_value, heads, value_scale)
        graph.output_cache(layer, present_key, present_value)
        out = op.Attention(query, keys, values, self._mask(past_key))
        return op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), [0, 0, spec.q_size])

    def conv(self, bcx: ir.Value, layer: int) -> ir.Value:
        return standard.conv(self.graph, bcx, layer)

    def gate(self, gate_up: ir.Value) -> ir.Value:
        return standard.silu_gate(self.graph, gate_up)

    def gated(self, x: ir.Value, linear: Linear) -> ir.Value:
        return self.gate(self.linear(x, linear))

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

    def _extend(self, past: ir.Value, fresh: ir.Value, scale: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """A cache with its new rows, as it is stored and as numbers; int8 where there is a scale."""
        op, graph = self.op, self.graph
        if scale is None:
            stored = op.TensorScatter(past, fresh, graph.past, axis=2)
            return stored, stored
        steps = op.Round(op.Div(op.Cast(fresh, to=ir.DataType.FLOAT), scale))
        codes = op.Cast(op.Clip(steps, -128.0, 127.0), to=ir.DataType.INT8)
        stored = op.TensorScatter(past, codes, graph.past, axis=2)
        return stored, op.Cast(op.Mul(op.Cast(stored, to=ir.DataType.FLOAT), scale), to=graph.dtype)

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
            lambda: graph.tensors.packed(linear).packed.view(np.uint8) ^ 0x88,  # offset 8 to two's complement
            ir.DataType.INT4,
        )
        scales = graph.weight(
            f"{linear.name}.weight_scale", (n, k // group_size), lambda: graph.tensors.packed(linear).scales
        )
        return self.op.DequantizeLinear(q, scales, axis=1, block_size=group_size)
