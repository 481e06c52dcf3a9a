"""onnxruntime's own operators: GroupQueryAttention on an in-place cache, MatMulNBits, fused norms and convolution.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from orin_kit.export.dialect import Graph
from orin_kit.export.dialects import matmulnbits
from orin_kit.export.options import EMBEDDING_GROUP
from orin_kit.export.tensors import Linear
from orin_kit.models.packing import PackedWeight
from orin_kit.models.spec import EMBEDDING
from orin_kit.quantize.int4 import quantize_groups

INT8_CACHE = MappingProxyType({"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"})


class OrtDialect:
    """See `Dialect`. Runs on the CPU and CUDA providers."""

    opsets: Mapping[str, int] = MappingProxyType({"": 21, "com.microsoft": 1})
    ties = True

    def __init__(self, graph: Graph) -> None:
        self.graph, self.op, self.ms = graph, graph.op, graph.ms
        sequence = self.op.Shape(graph.ids, start=1, end=2)
        total = self.op.Add(graph.past, sequence)
        # GroupQueryAttention counts the last valid index of each row, and wants the longest total as a scalar.
        self.seqlens_k = self.op.Cast(self.op.Sub(total, [1]), to=ir.DataType.INT32)
        self.total = self.op.Cast(self.op.ReduceMax(total, keepdims=0), to=ir.DataType.INT32)

    def embed(self, ids: ir.Value) -> ir.Value:
        graph, spec = self.graph, self.graph.spec
        if graph.options.tied_table:
            return self._embed_from_head(ids)
        if graph.embedding_bits == 16:
            rows = self.op.Gather(graph.embedding_table(), ids)
            return self.op.Cast(rows, to=graph.dtype)
        bits = graph.embedding_bits
        packed, scales = f"{EMBEDDING}.weight_packed", f"{EMBEDDING}.weight_scale"
        width = spec.hidden_size * bits // 8
        return self.ms.GatherBlockQuantized(
            graph.weight(packed, (spec.vocab_size, width), lambda: self._table[0], ir.DataType.UINT8),
            ids,
            graph.weight(scales, (spec.vocab_size, spec.hidden_size // EMBEDDING_GROUP), lambda: self._table[1]),
            bits=bits,
            block_size=EMBEDDING_GROUP,
            gather_axis=0,
            quantize_axis=1,
        )

    def norm(self, x: ir.Value, weight: str) -> ir.Value:
        return self._rms(x, weight, self.graph.spec.hidden_size)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        spec = self.graph.spec
        scale = self.graph.norm_weight(weight, spec.hidden_size)
        name = "SkipSimplifiedLayerNormalization"
        normed, _, _, total = self.ms.several(name, 4, x, residual, scale, epsilon=spec.rms_norm_eps)
        return normed, total

    def linear(self, x: ir.Value, linear: Linear) -> ir.Value:
        graph = self.graph
        if linear.group_size is None:
            if linear.parts == (EMBEDDING,):
                return self.ms.FusedMatMul(x, graph.embedding_table(), transB=1)
            y = self.op.MatMul(x, graph.dense_weight(linear))
            bias = graph.bias(linear)
            return y if bias is None else self.op.Add(y, bias)
        if linear.has_order:
            # Act-order: the columns are the input features in another order, so the features follow it.
            shape = (linear.in_features,)
            order = graph.weight(f"{linear.name}.order", shape, lambda: self._order(linear), ir.DataType.INT32)
            x = self.op.Gather(x, order, axis=-1)
        return self.ms.MatMulNBits(
            x,
            self._codes(linear),
            self._scales(linear),
            self._zero_points(linear),
            None,
            graph.bias(linear),
            N=linear.out_features,
            K=linear.in_features,
            bits=linear.bits,
            block_size=_block(linear),
            accuracy_level=graph.options.accuracy_level,
        )

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        graph, spec = self.graph, self.graph.spec
        key, value = graph.cache(layer)
        cos, sin = graph.rotary_tables()
        # The operator could norm the heads itself (q_norm_weight), but not on the CPU provider.
        query, fresh_key, fresh_value = self._split(qkv, layer) if spec.qk_norm else (qkv, None, None)
        scales = graph.kv_scales(layer)
        quantized: Mapping[str, Any] = {} if scales is None else INT8_CACHE
        attended, key, value = self.ms.several(
            "GroupQueryAttention",
            3,
            query,
            fresh_key,
            fresh_value,
            key,
            value,
            self.seqlens_k,
            self.total,
            cos,
            sin,
            *(() if scales is None else (None, None, None, *scales)),
            num_heads=spec.num_attention_heads,
            kv_num_heads=spec.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
            **quantized,
        )
        graph.output_cache(layer, key, value)
        return attended

    def conv(self, bcx: ir.Value, layer: int) -> ir.Value:
        # CausalConvWithState takes its new state from the padded end, so the state is gathered by itself. Still the
        # faster way to decode: 94 us a layer against 338 us with Concat and Conv (hidden 2048, kernel 24, 1 thread); a
        # prefill of 128 tokens takes 3.5 ms against 1.6 ms, which is little beside its linears.
        graph, op = self.graph, self.op
        b, c, x = op.several("Split", 3, bcx, num_outputs=3, axis=-1)
        fresh, past = op.Mul(b, x), graph.conv_state(layer)
        weight, bias = graph.conv_weight(layer)
        channels = op.Transpose(fresh, perm=[0, 2, 1])
        convolved, _ = self.ms.several("CausalConvWithState", 2, channels, weight, bias, past)
        seen = op.Concat(op.Transpose(past, perm=[0, 2, 1]), fresh, axis=1)
        state = op.GatherND(seen, graph.state_positions, batch_dims=1)
        graph.output_conv_state(layer, op.Transpose(state, perm=[0, 2, 1]))
        return op.Mul(c, op.Transpose(convolved, perm=[0, 2, 1]))

    def gate(self, gate_up: ir.Value) -> ir.Value:
        gate, up = self.op.several("Split", 2, gate_up, num_outputs=2, axis=-1)
        return self.op.Mul(self.ms.QuickGelu(gate, alpha=1.0), up)  # x * sigmoid(1.0 x) is SiLU

    def gated(self, x: ir.Value, linear: Linear) -> ir.Value:
        return self.gate(self.linear(x, linear))

    def _embed_from_head(self, ids: ir.Value) -> ir.Value:
        """Rows of the packed head: GatherBlockQuantized reads MatMulNBits' bytes in two dimensions instead of three."""
        head, spec = self.graph.tensors.head(), self.graph.spec
        assert head.bits is not None
        shape = (spec.vocab_size, spec.hidden_size * head.bits // 8)
        return self.ms.GatherBlockQuantized(
            self.graph.same_bytes(f"{EMBEDDING}.weight_packed", shape, self._codes(head)),
            ids,
            self._scales(head),
            self._zero_points(head),
            bits=head.bits,
            block_size=_block(head),
            gather_axis=0,
            quantize_axis=1,
        )

    def _codes(self, linear: Linear) -> ir.Value:
        assert linear.bits is not None
        block = _block(linear)
        shape = (linear.out_features, linear.in_features // block, block * linear.bits // 8)
        name = f"{linear.name}.weight_packed"
        return self.graph.weight(name, shape, lambda: matmulnbits.blob(self._in_blocks(linear)), ir.DataType.UINT8)

    def _scales(self, linear: Linear) -> ir.Value:
        shape = (linear.out_features, linear.in_features // _block(linear))
        return self.graph.weight(f"{linear.name}.weight_scale", shape, lambda: self._in_blocks(linear).scales)

    def _order(self, linear: Linear) -> NDArray[np.int32]:
        order = self.graph.tensors.packed(linear).order
        assert order is not None, "has_order says so"
        return order

    def _zero_points(self, linear: Linear) -> ir.Value | None:
        if not linear.has_zero_points:
            return None
        assert linear.bits is not None
        blocks = linear.in_features // _block(linear)
        shape = (linear.out_features, (blocks * linear.bits + 7) // 8)

        def points() -> NDArray[np.uint8]:
            packed = matmulnbits.zero_points(self._in_blocks(linear))
            assert packed is not None, "has_zero_points says so"
            return packed

        return self.graph.weight(f"{linear.name}.weight_zero_point", shape, points, ir.DataType.UINT8)

    def _in_blocks(self, linear: Linear) -> PackedWeight:
        return matmulnbits.in_blocks(self.graph.tensors.packed(linear))

    def _rms(self, x: ir.Value, weight: str, features: int) -> ir.Value:
        # onnxruntime keeps this operator of its own in the standard domain.
        scale = self.graph.norm_weight(weight, features)
        return self.op.SimplifiedLayerNormalization(
            x, scale, axis=-1, epsilon=self.graph.spec.rms_norm_eps, stash_type=1
        )

    def _split(self, qkv: ir.Value, layer: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Split query, key and value, and norm each head of the first two (Qwen3)."""
        graph, spec = self.graph, self.graph.spec
        sizes = graph.constant([spec.q_size, spec.kv_size, spec.kv_size])
        query, key, value = self.op.several("Split", 3, qkv, sizes, axis=-1)
        normed = []
        for name, x, size in (("q_norm", query, spec.q_size), ("k_norm", key, spec.kv_size)):
            heads = self.op.Reshape(x, [0, 0, size // spec.head_dim, spec.head_dim])
            heads = self._rms(heads, f"model.layers.{layer}.self_attn.{name}", spec.head_dim)
            normed.append(self.op.Reshape(heads, [0, 0, size]))
        return normed[0], normed[1], value

    @cached_property
    def _table(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The embedding quantized: uint8 `[vocab, hidden * bits / 8]`, scales `[vocab, hidden / EMBEDDING_GROUP]`."""
        bits = self.graph.embedding_bits
        table = np.asarray(self.graph.tensors.embedding(), np.float32)
        packed = quantize_groups(table, EMBEDDING_GROUP, bits=bits)
        return packed.packed.view(np.uint8), packed.scales


def _block(linear: Linear) -> int:
    assert linear.group_size is not None
    return matmulnbits.block_size(linear.group_size)
