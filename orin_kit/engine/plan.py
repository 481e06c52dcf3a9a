"""What an engine will be, worked out from the graph alone: profiles, bindings and their bytes, memory, plugins.

Nothing here needs TensorRT. A decoder engine has two profiles: profile 0 prefills (any number of tokens up to a chunk,
logits of a few positions), profile 1 decodes (one token a row). The cache's length is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orin_kit.engine.compatibility import IN_PLACE, SELECT
from orin_kit.engine.trt import Creator, Range, Shape
from orin_kit.errors import ArtifactError, UserError
from orin_kit.inspect.onnx_file import VALUE_BYTES, OnnxFile, Value
from orin_kit.models.spec import DecoderSpec

PREFILL, DECODE = 0, 1
PROFILE_NAMES = ("prefill", "decode")
PLUGIN_DOMAIN, PLUGIN_VERSION = "orin_kit", "1"
ALIGNMENT = 256  # of buffers on the device
CACHES = ("past_key_values.", "past_conv.")
# In memory at once while TensorRT builds: the parsed weights, the engine being timed, the serialized engine.
BUILD_COPIES = 3


@dataclass(frozen=True)
class Sizes:
    """Limits of an engine.

    Attributes:
        max_batch: rows.
        max_len: tokens of a row's cache.
        prefill: the most tokens of a row in one step; longer prompts take several.
        opt_prefill: tokens that the prefill kernels are chosen for.
        logits: the most positions of a row whose logits one step gives.
        lora_rank: of adapters; those of a lower rank are padded. 0 when the graph takes none.
    """

    max_batch: int
    max_len: int
    prefill: int
    opt_prefill: int
    logits: int
    lora_rank: int = 0

    def of(self, dimension: int | str, profile: int) -> tuple[int, int, int]:
        """Least, optimal and greatest size of a dimension, fixed or named."""
        if isinstance(dimension, int):
            return dimension, dimension, dimension
        if dimension == "batch":
            return 1, self.max_batch, self.max_batch
        if dimension == "max_len":
            return self.max_len, self.max_len, self.max_len
        if dimension.startswith("rank."):
            return self.lora_rank, self.lora_rank, self.lora_rank
        if dimension in ("sequence", "logits"):
            greatest = self.prefill if dimension == "sequence" else self.logits
            optimal = self.opt_prefill if dimension == "sequence" else 1
            return (1, optimal, greatest) if profile == PREFILL else (1, 1, 1)
        raise ArtifactError(f"the graph has a dimension {dimension!r} that no profile knows", mend="export it again")


@dataclass(frozen=True)
class Binding:
    """An input or output of the engine.

    Attributes:
        dtype: as `inspect` names it, "F16".
        shape: the graph's, names where it varies.
        greatest: its largest shape in each profile.
        bytes: of the buffer that holds it in every profile.
        shares: the input whose buffer it is as well; "" when it has its own.
    """

    name: str
    is_input: bool
    dtype: str
    shape: tuple[int | str, ...]
    greatest: tuple[Shape, Shape]
    bytes: int
    shares: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes. Weights, cache and buffers are counted; `activations` and `build` are estimates: docs/engines.md."""

    weights: int
    cache: int
    buffers: int
    activations: int
    workspace: int

    @property
    def run(self) -> int:
        return self.weights + self.cache + self.buffers + self.activations

    @property
    def build(self) -> int:
        return BUILD_COPIES * self.weights + self.cache + self.buffers + self.activations + self.workspace


@dataclass(frozen=True)
class Plan:
    """See the module.

    Attributes:
        cache_writing: see `compatibility.cache_writing`.
        profiles: input shapes by name, as `trt.Request` takes them.
        creators: plugins that the graph needs.
    """

    sizes: Sizes
    cache_writing: str
    profiles: tuple[Mapping[str, Range], Mapping[str, Range]]
    bindings: tuple[Binding, ...]
    creators: tuple[Creator, ...]
    memory: Memory


def make_plan(
    graph: OnnxFile, spec: DecoderSpec, sizes: Sizes, cache_writing: str, *, workspace: int | None = None
) -> Plan:
    """Plan the engine of a graph.

    Raises:
        UserError: sizes that contradict each other or the graph.
        ArtifactError: the graph is none of our decoders.
    """
    _check(graph, sizes)
    profiles = (_profile(graph, sizes, PREFILL), _profile(graph, sizes, DECODE))
    bindings = tuple(bindings_of(graph.inputs, graph.outputs, sizes, cache_writing))
    creators = tuple(
        Creator(name, PLUGIN_VERSION, PLUGIN_DOMAIN) for domain, name in sorted(graph.ops) if domain == PLUGIN_DOMAIN
    )
    memory = Memory(
        weights=sum(tensor.bytes for tensor in graph.initializers),
        cache=sum(b.bytes for b in bindings if is_cache(b) and not b.shares),
        buffers=sum(b.bytes for b in bindings if not is_cache(b) and not b.shares),
        activations=_activations(graph, spec, sizes, cache_writing),
        workspace=workspace or 0,
    )
    return Plan(sizes, cache_writing, profiles, bindings, creators, memory)


def past_of(present: str) -> str:
    """The input that an output of the cache comes from: `present.0.key` -> `past_key_values.0.key`."""
    return present.replace("present_conv.", "past_conv.").replace("present.", "past_key_values.")


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _check(graph: OnnxFile, sizes: Sizes) -> None:
    names = {value.name for value in graph.inputs}
    missing = {"input_ids", "past_lengths", "logit_positions"} - names
    if missing:
        raise ArtifactError(f"the graph has no input {min(missing)}", mend="give what orin-kit export wrote")
    for name, value in (
        ("--max-batch", sizes.max_batch), ("--max-len", sizes.max_len), ("--prefill", sizes.prefill),
        ("--opt-prefill", sizes.opt_prefill), ("--logits", sizes.logits),
    ):  # fmt: skip
        if value < 1:
            raise UserError(f"{name} is {value}", mend="give a positive whole number")
    for name, value, limit, other in (
        ("--prefill", sizes.prefill, sizes.max_len, "--max-len"),
        ("--opt-prefill", sizes.opt_prefill, sizes.prefill, "--prefill"),
        ("--logits", sizes.logits, sizes.prefill, "--prefill"),
    ):
        if value > limit:
            raise UserError(f"{name} {value} is more than {other} {limit}", mend="lower it")
    adapts = any(name.startswith("lora_") for name in names)
    if adapts and not sizes.lora_rank:
        raise UserError("the graph takes adapters", mend="give their largest rank with --lora-rank")
    if sizes.lora_rank and not adapts:
        raise UserError("the graph takes no adapters", mend="leave out --lora-rank, or export with --lora-targets")


def _profile(graph: OnnxFile, sizes: Sizes, profile: int) -> dict[str, Range]:
    """Ranges of all inputs, fixed ones too: a profile may say them."""
    shapes: dict[str, Range] = {}
    for value in graph.inputs:
        ranges = [sizes.of(dimension, profile) for dimension in value.shape]
        least, optimal, greatest = (tuple(one[place] for one in ranges) for place in range(3))
        shapes[value.name] = (least, optimal, greatest)
    return shapes


def bindings_of(
    inputs: Sequence[Value], outputs: Sequence[Value], sizes: Sizes, cache_writing: str
) -> Iterator[Binding]:
    """Buffers for a graph's inputs and outputs.

    Raises:
        ArtifactError: a cache has no input.
    """
    given = {value.name for value in inputs}
    for value in (*inputs, *outputs):
        prefill, decode = (_greatest(value, sizes, profile) for profile in (PREFILL, DECODE))
        size = VALUE_BYTES[value.dtype] * max(math.prod(prefill), math.prod(decode))
        past = past_of(value.name)
        in_place = past != value.name and past.startswith("past_key_values.") and cache_writing in IN_PLACE
        if in_place and past not in given:
            raise ArtifactError(f"the output {value.name} has no input {past}", mend="export it again")
        yield Binding(
            name=value.name,
            is_input=value.name in given,
            dtype=value.dtype,
            shape=value.shape,
            greatest=(prefill, decode),
            bytes=padded(size),
            shares=past if in_place else "",
        )


def _greatest(value: Value, sizes: Sizes, profile: int) -> Shape:
    return tuple(sizes.of(dimension, profile)[2] for dimension in value.shape)


def is_cache(binding: Binding) -> bool:
    return past_of(binding.name).startswith(CACHES)


def _activations(graph: OnnxFile, spec: DecoderSpec, sizes: Sizes, cache_writing: str) -> int:
    """What is alive at once in the widest place of a layer, or at the head, of the prefill profile: an estimate.

    The hidden state and its norm all the time; beside them query, key and value with what they attend to, or gate and
    up with their product; attention without a plugin holds scores of the whole cache, twice.
    """
    floats = {value.dtype for value in graph.inputs if value.name.startswith(CACHES) and value.dtype != "I8"}
    width = VALUE_BYTES[next(iter(floats), "F16")]
    tokens = sizes.max_batch * sizes.prefill
    mixer = 2 * spec.q_size + 2 * spec.kv_size if spec.num_attention_heads else 4 * spec.hidden_size
    mlp = 3 * spec.intermediate_size
    layer = tokens * (3 * spec.hidden_size + max(mixer, mlp)) * width
    if cache_writing == SELECT or any(name == "Softmax" for _domain, name in graph.ops):
        layer += 2 * tokens * spec.num_attention_heads * sizes.max_len * width
    head = tokens * 2 * spec.hidden_size * width + sizes.max_batch * sizes.logits * spec.vocab_size * width
    return max(layer, head)
