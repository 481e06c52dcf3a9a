"""What an export dialect is: the same decoder said in another runtime's operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from orin_kit.export.options import GraphOptions
from orin_kit.export.tensors import DecoderTensors, Linear
from orin_kit.models.spec import EMBEDDING

FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
SAME_BYTES = "same_bytes"  # in an initializer's `meta`: the name of another one that holds its data


class Dialect(Protocol):
    """One way to say each block of a decoder. `x` is always `[batch, sequence, features]` in the activations' dtype.

    Implementations live in `dialects/` and never import each other.
    """

    opsets: Mapping[str, int]
    ties: bool  # can read the embedding from the packed head's own bytes (`GraphOptions.tied_table`)

    def __init__(self, graph: Graph) -> None: ...

    def embed(self, ids: ir.Value) -> ir.Value:
        """Token ids int64 `[batch, sequence]` -> `[batch, sequence, hidden]`."""
        ...

    def norm(self, x: ir.Value, weight: str) -> ir.Value:
        """RMS norm over the features."""
        ...

    def add_norm(self, x: ir.Value, residual: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        """`(norm(x + residual), x + residual)`."""
        ...

    def linear(self, x: ir.Value, linear: Linear) -> ir.Value: ...

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        """Query, key and value side by side -> attended values `[batch, sequence, q_size]`; updates the cache."""
        ...

    def conv(self, bcx: ir.Value, layer: int) -> ir.Value:
        """Two gates and an input side by side, `[batch, sequence, 3 * hidden]` -> `c * causal_conv(b * x)`.

        The convolution is depthwise, `conv_kernel_size` positions ending at each one's own. Updates the state: the last
        `b * x` of each row's `input_lengths` tokens.
        """
        ...

    def gate(self, gate_up: ir.Value) -> ir.Value:
        """`silu(gate) * up` of the two halves."""
        ...

    def gated(self, x: ir.Value, linear: Linear) -> ir.Value:
        """`gate(linear(x))`, which a dialect may fuse."""
        ...


class Ops:
    """One operator set of a graph under construction, with types: `ops.MatMul(x, w)` is the node's output."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        node: Callable[..., ir.Value] = getattr(self._builder, op_type)
        return node

    def several(self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        """A node of `count` outputs."""
        outputs: Sequence[ir.Value] = getattr(self._builder, op_type)(*inputs, _outputs=count, **attributes)
        return outputs


class Graph:
    """The graph under construction: what every dialect needs to add to it.

    Attributes:
        build: the graph builder.
        op, ms: the standard operators, and onnxruntime's `com.microsoft`.
        tensors: the checkpoint.
        dtype: of the activations, the cache and (unless packed) the weights.
        ids: input_ids int64 `[batch, sequence]`.
        past: past_lengths int64 `[batch]`, tokens in each row's cache before this call.
        max_positions: rows of the rotary tables, the longest context the graph can do.
        embedding_bits: 16 (as stored), 8 or 4.
        options: the rest of what was asked for.
        cache_dtype: of keys and values in the cache.
    """

    def __init__(
        self,
        build: GraphBuilder,
        tensors: DecoderTensors,
        dtype: ir.DataType,
        max_positions: int,
        embedding_bits: int,
        options: GraphOptions,
    ) -> None:
        self.build, self.tensors, self.dtype = build, tensors, dtype
        self.op, self.ms = Ops(build.op), Ops(build.opset("com.microsoft", 1))
        self.spec = tensors.spec
        self.max_positions, self.embedding_bits, self.options = max_positions, embedding_bits, options
        self.cache_dtype = ir.DataType.INT8 if options.kv_bits == 8 else dtype
        self.ids = build.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        self.past = build.input("past_lengths", ir.DataType.INT64, ["batch"])

    def weight(
        self, name: str, shape: tuple[int, ...], make: Callable[[], NDArray[Any]], dtype: ir.DataType | None = None
    ) -> ir.Value:
        """An initializer whose data is made when the file is written; the same name twice is the same initializer.

        Args:
            name: in the graph.
            shape: of the tensor.
            make: returns it, in any float dtype (cast here), or bytes `[..., n / 2]` when `dtype` is INT4.
            dtype: the activations' own when not given.
        """
        known = self.build.graph.initializers
        if name in known:
            return known[name]
        dtype = dtype or self.dtype

        def tensor() -> ir.TensorProtocol:
            data = make()
            if dtype is ir.DataType.INT4:
                return ir.PackedTensor(data, dtype, shape=shape, name=name)
            return ir.tensor(np.ascontiguousarray(data.astype(dtype.numpy(), copy=False)), name=name)

        return self.build.initializer(ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name), name)

    def same_bytes(self, name: str, shape: tuple[int, ...], other: ir.Value) -> ir.Value:
        """An initializer of another shape over the bytes of `other`, which a file holds once (see `save.py`)."""
        assert other.const_value is not None and other.dtype is not None
        tensor = ir.LazyTensor(lambda: _reshaped(other.const_value, shape), other.dtype, ir.Shape(shape), name=name)
        value = self.build.initializer(tensor, name)
        value.meta[SAME_BYTES] = other.name
        return value

    def constant(self, values: Sequence[int]) -> ir.Value:
        """An int64 vector."""
        return self.op.Constant(value_ints=list(values))

    def embedding_table(self) -> ir.Value:
        """The table `[vocab, hidden]`: in the activations' dtype, or fp16 in an INT4 model with a head of its own."""
        spec, tensors = self.spec, self.tensors
        shared = tensors.head().parts == (EMBEDDING,)
        dtype = self.dtype if shared or not tensors.is_quantized else ir.DataType.FLOAT16
        return self.weight(f"{EMBEDDING}.weight", (spec.vocab_size, spec.hidden_size), tensors.embedding, dtype)

    def norm_weight(self, name: str, features: int) -> ir.Value:
        return self.weight(f"{name}.weight", (features,), lambda: self.tensors.vector(name))

    def dense_weight(self, linear: Linear) -> ir.Value:
        """`[in, out]`, as MatMul wants it."""
        shape = (linear.in_features, linear.out_features)
        return self.weight(f"{linear.name}.weight", shape, lambda: self.tensors.dense(linear).T)

    def bias(self, linear: Linear) -> ir.Value | None:
        if not linear.bias:
            return None
        return self.weight(f"{linear.name}.bias", (linear.out_features,), lambda: self.tensors.bias(linear))

    def rotary_tables(self, dtype: ir.DataType | None = None) -> tuple[ir.Value, ir.Value]:
        """cos and sin `[max_positions, head_dim / 2]`, in the activations' dtype when none is given."""
        shape = (self.max_positions, self.spec.head_dim // 2)

        def table(index: int) -> Callable[[], NDArray[Any]]:
            assert self.spec.rope is not None, "this decoder does not attend"
            rope = self.spec.rope
            return lambda: rope.cos_sin(self.max_positions, self.spec.head_dim)[index]

        return self.weight("rotary.cos", shape, table(0), dtype), self.weight("rotary.sin", shape, table(1), dtype)

    def cache(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """The layer's key and value cache inputs `[batch, kv_heads, max_len, head_dim]`."""
        names = cache_names("past_key_values", layer)
        key, value = (self.build.input(name, self.cache_dtype, self._cache_shape()) for name in names)
        return key, value

    def output_cache(self, layer: int, key: ir.Value, value: ir.Value) -> None:
        for name, output in zip(cache_names("present", layer), (key, value), strict=True):
            output.type, output.shape = ir.TensorType(self.cache_dtype), ir.Shape(self._cache_shape())
            self.build.add_output(output, name)

    def kv_scales(self, layer: int) -> tuple[ir.Value, ir.Value] | None:
        """Scales of an int8 cache's keys and values, fp32 `[1, kv_heads, 1, head_dim]`; None for other caches."""
        if self.options.kv_bits != 8:
            return None
        spec, name = self.spec, f"model.layers.{layer}.self_attn"
        shape = (1, spec.num_key_value_heads, 1, spec.head_dim)

        def scale(index: int) -> Callable[[], NDArray[Any]]:
            return lambda: _scales(self.tensors, layer)[index].reshape(shape)

        key, value = (
            self.weight(f"{name}.{part}", shape, scale(index), ir.DataType.FLOAT)
            for index, part in enumerate(("k_scale", "v_scale"))
        )
        return key, value

    @cached_property
    def input_lengths(self) -> ir.Value:
        """int64 `[batch]`, the tokens of each row that are no padding; an input of graphs that convolve."""
        return self.build.input("input_lengths", ir.DataType.INT64, ["batch"])

    @cached_property
    def state_positions(self) -> ir.Value:
        """Where in old state and new inputs end to end a row's new state lies, int64 `[batch, state, 1]`."""
        steps = self.constant(range(self.spec.conv_kernel_size - 1))
        return self.op.Unsqueeze(self.op.Add(self.op.Unsqueeze(self.input_lengths, [1]), steps), [2])

    def conv_weight(self, layer: int) -> tuple[ir.Value, ir.Value | None]:
        """The layer's depthwise convolution: weight `[hidden, 1, conv_kernel_size]`, and its bias `[hidden]`."""
        spec, name = self.spec, f"model.layers.{layer}.{self.spec.layout.conv}"
        shape = (spec.hidden_size, 1, spec.conv_kernel_size)
        weight = self.weight(f"{name}.weight", shape, lambda: self.tensors.vector(name))
        if not spec.conv_bias:
            return weight, None
        return weight, self.weight(f"{name}.bias", shape[:1], lambda: self.tensors.checkpoint.float32(f"{name}.bias"))

    def conv_state(self, layer: int) -> ir.Value:
        """The layer's state input `[batch, hidden, conv_kernel_size - 1]`, the oldest first."""
        return self.build.input(conv_name("past", layer), self.dtype, self._state_shape())

    def output_conv_state(self, layer: int, state: ir.Value) -> None:
        state.type, state.shape = ir.TensorType(self.dtype), ir.Shape(self._state_shape())
        self.build.add_output(state, conv_name("present", layer))

    def _state_shape(self) -> list[int | str]:
        return ["batch", self.spec.hidden_size, self.spec.conv_kernel_size - 1]

    def _cache_shape(self) -> list[int | str]:
        return ["batch", self.spec.num_key_value_heads, "max_len", self.spec.head_dim]


def _scales(tensors: DecoderTensors, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    scales = tensors.checkpoint.kv_scales(layer)
    assert scales is not None, "export() checks that there are scales"
    return scales


def _reshaped(tensor: ir.TensorProtocol | None, shape: tuple[int, ...]) -> ir.TensorProtocol:
    assert tensor is not None
    return ir.tensor(tensor.numpy().reshape(shape))


def cache_names(prefix: str, layer: int) -> tuple[str, str]:
    """The names of a layer's cache in the graph: `past_key_values.0.key`, `present.0.value`, ..."""
    return f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"


def conv_name(when: str, layer: int) -> str:
    """The name of a layer's convolution state in the graph: `past_conv.0`, `present_conv.0`, ..."""
    return f"{when}_conv.{layer}"
