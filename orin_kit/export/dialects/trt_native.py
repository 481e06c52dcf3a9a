"""TensorRT's own layers, no plugins: standard operators of opset 21, INT4 weights by block DequantizeLinear.

TensorRT takes INT4 weights that are constants, symmetric, in blocks along one of the last two dimensions
(https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/Dequantize.html); here they lie `[in, out]`.
The cache is written in one of two ways (`GraphOptions.kv_update`): "select" picks old or new row by row, which any
parser reads and which copies the cache at every step; "layer" is TensorRT's in-place layer, as the operator
`TRT_KVCacheUpdate` that parsers know since TensorRT 11.0
(https://github.com/onnx/onnx-tensorrt/blob/main/docs/TRT_custom_ops.md). No TensorRT has parsed these graphs yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from orin_kit.errors import UserError
from orin_kit.export import standard
from orin_kit.export.dialect import Graph, Ops
from orin_kit.export.options import EMBEDDING_GROUP
from orin_kit.export.tensors import Linear
from orin_kit.models.packing import PackedWeight
from orin_kit.models.spec import EMBEDDING
from orin_kit.quantize.int4 import quantize_groups

DOMAIN = "trt"
MASKED = -65504.0  # the least fp16


class TrtNativeDialect:
    """See `Dialect`. Types are explicit everywhere, as strongly typed networks want them."""

    opsets: Mapping[str, int] = MappingProxyType({"": 21, DOMAIN: 1})
    ties = False

    def __init__(self, graph: Graph) -> None:
        self.graph, self.op = graph, graph.op
        if graph.options.tied_table or graph.embedding_bits == 4:
            raise UserError("TensorRT's own layers do not gather INT4 rows", mend="use --embedding-bits 8 and --no-tie")
        op = self.op
        self.length = op.Squeeze(op.Shape(graph.ids, start=1, end=2), [0])
        steps = op.Range(0, self.length, 1)
        self.positions = op.Add(op.Unsqueeze(graph.past, [1]), op.Unsqueeze(steps, [0]))  # [batch, sequence]

    def embed(self, ids: ir.Value) -> ir.Value:
        graph, op, spec = self.graph, self.op, self.graph.spec
        if graph.embedding_bits == 16:
            return op.Cast(op.Gather(graph.embedding_table(), ids), to=graph.dtype)
        name, groups = EMBEDDING, spec.hidden_size // EMBEDDING_GROUP
        table = graph.weight(
            f"{name}.weight_packed", (spec.vocab_size, spec.hidden_size), self._signed, ir.DataType.INT8
        )
        scales = graph.weight(f"{name}.weight_scale", (spec.vocab_size, groups), lambda: self._table.scales)
        rows = op.Reshape(op.Cast(op.Gather(table, ids), to=graph.dtype), [0, 0, groups, EMBEDDING_GROUP])
        return op.Reshape(op.Mul(rows, op.Unsqueeze(op.Gather(scales, ids), [3])), [0, 0, spec.hidden_size])

    def norm(self, x: ir.Value, weight: str) -> ir.Value:
        return self._rms(x, weight, self.graph.spec.hidden_size)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        total = self.op.Add(x, residual)
        return self.norm(total, weight), total

    def linear(self, x: ir.Value, linear: Linear) -> ir.Value:
        graph = self.graph
        if linear.group_size is not None:
            weight = self._dequantized(linear, linear.group_size)
        elif linear.parts == (EMBEDDING,):
            weight = self.op.Transpose(graph.embedding_table(), perm=[1, 0])
        else:
            weight = graph.dense_weight(linear)
        y, bias = self.op.MatMul(x, weight), graph.bias(linear)
        return y if bias is None else self.op.Add(y, bias)

    def gate(self, gate_up: ir.Value) -> ir.Value:
        return standard.silu_gate(self.graph, gate_up)

    def gated(self, x: ir.Value, linear: Linear) -> ir.Value:
        return self.gate(self.linear(x, linear))

    def conv(self, bcx: ir.Value, layer: int) -> ir.Value:
        return standard.conv(self.graph, bcx, layer)

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        graph, spec, op = self.graph, self.graph.spec, self.op
        kv_heads, dim = spec.num_key_value_heads, spec.head_dim
        sizes = graph.constant([spec.q_size, spec.kv_size, spec.kv_size])
        query, key, value = op.several("Split", 3, qkv, sizes, axis=-1)
        name = f"model.layers.{layer}.self_attn"
        query = self._rotate(self._heads(query, spec.num_attention_heads), f"{name}.q_norm")
        key = self._rotate(self._heads(key, kv_heads), f"{name}.k_norm")
        value = op.Transpose(self._heads(value, kv_heads), perm=[0, 2, 1, 3])
        pasts, scales = graph.cache(layer), graph.kv_scales(layer) or (None, None)
        self.max_len = op.Squeeze(op.Shape(pasts[0], start=2, end=3), [0])
        (key, keys), (value, values) = (self._extend(*each) for each in zip(pasts, (key, value), scales, strict=True))
        graph.output_cache(layer, key, value)
        # The query heads of one key head are rows of one multiplication: [batch, kv_heads, group * sequence, dim].
        query = op.Reshape(op.Mul(query, self._number(dim**-0.5)), [0, kv_heads, -1, dim])
        scores = op.MatMul(query, op.Transpose(keys, perm=[0, 1, 3, 2]))
        shape = op.Concat(
            graph.constant([0, kv_heads, -1]), op.Unsqueeze(self.length, [0]), op.Unsqueeze(self.max_len, [0]), axis=0
        )
        scores = op.Where(self.mask, op.Reshape(scores, shape), self._number(MASKED))
        merged = op.Concat(graph.constant([0, kv_heads, -1]), op.Unsqueeze(self.max_len, [0]), axis=0)
        out = op.MatMul(op.Reshape(op.Softmax(scores, axis=-1), merged), values)
        split = op.Concat(
            graph.constant([0, spec.num_attention_heads]), op.Unsqueeze(self.length, [0]), graph.constant([dim]), axis=0
        )
        return op.Reshape(op.Transpose(op.Reshape(out, split), perm=[0, 2, 1, 3]), [0, 0, spec.q_size])

    @cached_property
    def mask(self) -> ir.Value:
        """Bool `[batch, 1, 1, sequence, max_len]`: a position sees itself and what came before it."""
        op = self.op
        slots = op.Range(0, self.max_len, 1)
        return op.Unsqueeze(op.GreaterOrEqual(op.Unsqueeze(self.positions, [2]), slots), [1, 2])

    @cached_property
    def sources(self) -> tuple[ir.Value, ir.Value]:
        """Which new token each slot of the cache takes, int64 `[batch, max_len, 1]`, and whether it takes one."""
        op = self.op
        ago = op.Sub(op.Unsqueeze(op.Range(0, self.max_len, 1), [0]), op.Unsqueeze(self.graph.past, [1]))
        fresh = op.And(op.GreaterOrEqual(ago, 0), op.Less(ago, self.length))
        within = op.Min(op.Max(ago, 0), op.Sub(self.length, 1))
        return op.Unsqueeze(within, [2]), op.Unsqueeze(fresh, [1, 3])

    def _extend(self, past: ir.Value, fresh: ir.Value, scale: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """A cache with its new rows `[batch, kv_heads, sequence, dim]`, as it is stored and as numbers."""
        op, graph = self.op, self.graph
        if scale is not None:
            steps = op.Round(op.Div(op.Cast(fresh, to=ir.DataType.FLOAT), scale))
            fresh = op.Cast(op.Clip(steps, -128.0, 127.0), to=ir.DataType.INT8)
        stored = self._write(past, fresh)
        if scale is None:
            return stored, stored
        return stored, op.Cast(op.Mul(op.Cast(stored, to=ir.DataType.FLOAT), scale), to=graph.dtype)

    def _write(self, past: ir.Value, fresh: ir.Value) -> ir.Value:
        op, graph = self.op, self.graph
        if graph.options.kv_update == "layer":
            layer = Ops(graph.build.opset(DOMAIN, 1))
            written = layer.TRT_KVCacheUpdate(past, fresh, op.Cast(graph.past, to=ir.DataType.INT32), axis=-2)
            written.type, written.shape = past.type, past.shape
            return written
        places, taken = self.sources
        rows = op.GatherND(op.Transpose(fresh, perm=[0, 2, 1, 3]), places, batch_dims=1)
        return op.Where(taken, op.Transpose(rows, perm=[0, 2, 1, 3]), past)

    def _rms(self, x: ir.Value, weight: str, features: int) -> ir.Value:
        op, graph = self.op, self.graph
        wide = op.Cast(x, to=ir.DataType.FLOAT)
        mean = op.ReduceMean(op.Mul(wide, wide), [-1], keepdims=1)
        normed = op.Div(wide, op.Sqrt(op.Add(mean, graph.spec.rms_norm_eps)))
        return op.Mul(op.Cast(normed, to=graph.dtype), graph.norm_weight(weight, features))

    def _heads(self, x: ir.Value, heads: int) -> ir.Value:
        return self.op.Reshape(x, [0, 0, heads, self.graph.spec.head_dim])

    def _rotate(self, heads: ir.Value, norm: str) -> ir.Value:
        """Norm (Qwen3) and rotate; `[batch, sequence, heads, dim]` -> `[batch, heads, sequence, dim]`."""
        op = self.op
        if self.graph.spec.qk_norm:
            heads = self._rms(heads, norm, self.graph.spec.head_dim)
        cos, sin = self.angles
        first, second = op.several("Split", 2, heads, num_outputs=2, axis=-1)
        turned = op.Concat(
            op.Sub(op.Mul(first, cos), op.Mul(second, sin)), op.Add(op.Mul(second, cos), op.Mul(first, sin)), axis=-1
        )
        return op.Transpose(turned, perm=[0, 2, 1, 3])

    @cached_property
    def angles(self) -> tuple[ir.Value, ir.Value]:
        """cos and sin of each token `[batch, sequence, 1, dim / 2]`."""
        last = self.op.Min(self.positions, self.graph.max_positions - 1)  # padding may lie behind the tables
        cos, sin = (self.op.Unsqueeze(self.op.Gather(table, last), [2]) for table in self.graph.rotary_tables())
        return cos, sin

    def _number(self, value: float) -> ir.Value:
        return self.op.Cast(self.op.Constant(value_float=value), to=self.graph.dtype)

    def _dequantized(self, linear: Linear, group_size: int) -> ir.Value:
        """`[in, out]` from signed INT4 and its group scales."""
        if linear.bits != 4 or linear.has_zero_points or linear.has_order:
            what = f"{linear.name} is packed in a way that TensorRT's INT4 layers do not read"
            mend = "quantize again with `orin-kit quantize` (symmetric, 4 bits), or use --precision fp16"
            raise UserError(what, mend=mend)
        graph, n, k = self.graph, linear.out_features, linear.in_features
        q = graph.weight(
            f"{linear.name}.weight_packed", (k, n), lambda: _signed_int4(graph.tensors.packed(linear)), ir.DataType.INT4
        )
        scales = graph.weight(
            f"{linear.name}.weight_scale", (k // group_size, n), lambda: graph.tensors.packed(linear).scales.T
        )
        return self.op.DequantizeLinear(q, scales, axis=0, block_size=group_size)

    @cached_property
    def _table(self) -> PackedWeight:
        table = np.asarray(self.graph.tensors.embedding(), np.float32)
        return quantize_groups(table, EMBEDDING_GROUP, bits=8)

    def _signed(self) -> NDArray[np.int8]:
        signed: NDArray[np.int8] = (self._table.codes() ^ np.uint8(128)).view(np.int8)
        return signed


def _signed_int4(weight: PackedWeight) -> NDArray[np.uint8]:
    """Codes transposed and in two's complement, two of a row in a byte: uint8 `[in, out / 2]`."""
    codes = np.ascontiguousarray(weight.codes().T) ^ np.uint8(8)
    packed: NDArray[np.uint8] = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed
