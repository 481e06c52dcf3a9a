"""TensorRT with our own plugins: attention on an in-place cache, INT4 linears, fused norms.

`plugin_ops.py` says what the operators compute, `jetson/plugins` has the kernels. The parser finds a plugin by the
node's type and its attributes plugin_version and plugin_namespace
(https://github.com/onnx/onnx-tensorrt, isNodeInPluginRegistry). No TensorRT has parsed these graphs yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from orin_kit.errors import UserError
from orin_kit.export import standard
from orin_kit.export.dialect import Graph, Ops
from orin_kit.export.interleave import FEATURES, ROWS, interleave, tiles
from orin_kit.export.options import EMBEDDING_GROUP
from orin_kit.export.tensors import Linear
from orin_kit.models.packing import PackedWeight
from orin_kit.models.spec import EMBEDDING
from orin_kit.quantize.int4 import quantize_groups

DOMAIN = "orin_kit"
PLUGIN = MappingProxyType({"plugin_version": "1", "plugin_namespace": DOMAIN})
HEAD_DIMS, GROUPS = (64, 128), (32, 64, 128)


class TrtPluginDialect:
    """See `Dialect`. Activations are fp16; fp32 serves to check a graph."""

    opsets: Mapping[str, int] = MappingProxyType({"": 21, DOMAIN: 1})
    ties = True

    def __init__(self, graph: Graph) -> None:
        self.graph, self.op = graph, graph.op
        self.plugin = Ops(graph.build.opset(DOMAIN, 1))
        _check(graph)
        self.past = self.op.Cast(graph.past, to=ir.DataType.INT32)

    def embed(self, ids: ir.Value) -> ir.Value:
        graph, spec = self.graph, self.graph.spec
        if graph.embedding_bits == 16 and not graph.options.tied_table:
            return self.op.Cast(self.op.Gather(graph.embedding_table(), ids), to=graph.dtype)
        how: dict[str, Any] = {"hidden_size": spec.hidden_size, "output_type": int(graph.dtype), **PLUGIN}
        if graph.options.tied_table:
            head = graph.tensors.head()
            table, scales = self._packed(head)
            how |= {"bits": 4, "group_size": head.group_size, "layout": "int4_linear"}
        else:
            bits, rows = graph.embedding_bits, spec.vocab_size
            # As words: TensorRT's ONNX parser makes an int32 of each uint8.
            shape = (rows, spec.hidden_size * bits // 32)
            table = graph.weight(f"{EMBEDDING}.weight_packed", shape, lambda: self._table[0], ir.DataType.INT32)
            shape = (rows, spec.hidden_size // EMBEDDING_GROUP)
            scales = graph.weight(f"{EMBEDDING}.weight_scale", shape, lambda: self._table[1], ir.DataType.FLOAT16)
            how |= {"bits": bits, "group_size": EMBEDDING_GROUP, "layout": "rows"}
        return self._typed(self.plugin.EmbeddingGather(ids, table, scales, **how), spec.hidden_size)

    def norm(self, x: ir.Value, weight: str) -> ir.Value:
        features = self.graph.spec.hidden_size
        normed = self.plugin.SkipRmsNorm(x, self.graph.norm_weight(weight, features), **self._norm())
        return self._typed(normed, features, x)

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        features = self.graph.spec.hidden_size
        scale = self.graph.norm_weight(weight, features)
        normed, total = self.plugin.several("SkipRmsNorm", 2, x, scale, residual, **self._norm())
        return self._typed(normed, features), self._typed(total, features)

    def linear(self, x: ir.Value, linear: Linear) -> ir.Value:
        if linear.group_size is not None:
            return self._int4(x, linear, "none")
        if linear.parts == (EMBEDDING,):
            weight = self.op.Transpose(self.graph.embedding_table(), perm=[1, 0])
        else:
            weight = self.graph.dense_weight(linear)
        y, bias = self.op.MatMul(x, weight), self.graph.bias(linear)
        return y if bias is None else self.op.Add(y, bias)

    def gated(self, x: ir.Value, linear: Linear) -> ir.Value:
        if linear.group_size is None:
            return self.gate(self.linear(x, linear))
        return self._int4(x, linear, "silu_gate")

    def gate(self, gate_up: ir.Value) -> ir.Value:
        return standard.silu_gate(self.graph, gate_up)

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        graph, spec = self.graph, self.graph.spec
        key, value = graph.cache(layer)
        more: list[ir.Value] = []
        if spec.qk_norm:
            norms = (f"model.layers.{layer}.self_attn.{name}" for name in ("q_norm", "k_norm"))
            more += [graph.norm_weight(norm, spec.head_dim) for norm in norms]
        more += graph.kv_scales(layer) or ()
        attended, key, value = self.plugin.several(
            "KvAttention", 3, qkv, key, value, self.past, *graph.rotary_tables(ir.DataType.FLOAT), *more,
            num_heads=spec.num_attention_heads, kv_num_heads=spec.num_key_value_heads, head_dim=spec.head_dim,
            scale=spec.head_dim**-0.5, qk_norm=int(spec.qk_norm), norm_epsilon=spec.rms_norm_eps, **PLUGIN,
        )  # fmt: skip
        graph.output_cache(layer, key, value)
        return self._typed(attended, spec.q_size)

    def conv(self, bcx: ir.Value, layer: int) -> ir.Value:
        return standard.conv(self.graph, bcx, layer)

    def _int4(self, x: ir.Value, linear: Linear, activation: str) -> ir.Value:
        _check_linear(linear, ROWS if activation == "none" else 2 * ROWS)
        gated = activation == "silu_gate"
        weight, scales = self._packed(linear, gated)
        y = self.plugin.Int4Linear(
            x, weight, scales, *self._bias(linear, gated), N=linear.out_features, K=linear.in_features,
            group_size=linear.group_size, activation=activation, **PLUGIN,
        )  # fmt: skip
        return self._typed(y, linear.out_features // (2 if gated else 1), x)

    def _packed(self, linear: Linear, gated: bool = False) -> tuple[ir.Value, ir.Value]:
        """The weight in tiles, and scales fp16 `[in / group_size, out]`."""
        n, k, group = linear.out_features, linear.in_features, linear.group_size
        assert group is not None

        def weight() -> PackedWeight:
            packed = self.graph.tensors.packed(linear)
            return _in_pairs(packed) if gated else packed

        return (
            self.graph.weight(
                f"{linear.name}.weight_tiles", tiles(n, k), lambda: interleave(weight()), ir.DataType.INT32
            ),
            self.graph.weight(
                f"{linear.name}.weight_scale", (k // group, n), lambda: weight().scales.T, ir.DataType.FLOAT16
            ),
        )

    def _bias(self, linear: Linear, gated: bool) -> tuple[ir.Value, ...]:
        if not linear.bias:
            return ()
        tensors, shape = self.graph.tensors, (linear.out_features,)

        def bias() -> NDArray[np.float32]:
            stored = tensors.bias(linear)
            return stored.reshape(2, -1).T.reshape(-1) if gated else stored

        return (self.graph.weight(f"{linear.name}.bias", shape, bias),)

    def _norm(self) -> dict[str, Any]:
        return {"epsilon": self.graph.spec.rms_norm_eps, **PLUGIN}

    def _typed(self, value: ir.Value, features: int, like: ir.Value | None = None) -> ir.Value:
        """Shape inference does not know our operators: `[batch, sequence, features]`, or as many rows as `like`."""
        leading = ["batch", "sequence"] if like is None or like.shape is None else list(like.shape)[:-1]
        value.type, value.shape = ir.TensorType(self.graph.dtype), ir.Shape([*leading, features])
        return value

    @cached_property
    def _table(self) -> tuple[NDArray[Any], NDArray[Any]]:
        table = np.asarray(self.graph.tensors.embedding(), np.float32)
        packed = quantize_groups(table, EMBEDDING_GROUP, bits=self.graph.embedding_bits)
        return packed.packed, packed.scales


def _in_pairs(weight: PackedWeight) -> PackedWeight:
    """Gate and up one after the other -> row by row: gate 0, up 0, gate 1, ..."""
    rows = np.arange(len(weight.packed)).reshape(2, -1).T.reshape(-1)
    return PackedWeight(weight.bits, weight.packed[rows], weight.scales[rows])


def _check(graph: Graph) -> None:
    """Say what the kernels are not made for."""
    spec = graph.spec
    if graph.dtype is ir.DataType.BFLOAT16:
        raise UserError("the trt_plugin dialect has no bf16 kernels", mend="use --activations fp16")
    if spec.layout.mixer == "attention" and spec.head_dim not in HEAD_DIMS:
        what = f"head_dim {spec.head_dim} has no attention kernel (64 and 128 have)"
        raise UserError(what, mend="use --dialect trt_native")


def _check_linear(linear: Linear, rows: int) -> None:
    mend = "quantize again with `orin-kit quantize` (symmetric, 4 bits, groups of 32, 64 or 128)"
    if linear.bits != 4 or linear.has_zero_points or linear.has_order or linear.group_size not in GROUPS:
        raise UserError(f"{linear.name} is packed in a way that the INT4 kernels do not read", mend=mend)
    if linear.in_features % FEATURES or linear.out_features % rows:
        what = (
            f"{linear.name} is [{linear.out_features}, {linear.in_features}], the INT4 kernels need multiples of "
            f"{rows} and {FEATURES}"
        )
        raise UserError(what, mend="use --dialect trt_native, or --precision fp16")
