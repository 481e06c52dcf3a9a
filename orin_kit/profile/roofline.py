"""The roofline of a device: how fast a decoder could be there, from the bytes and operations of a step alone.

A prediction, not a measurement: kernels that wait, launch overheads, sampling and the tokenizer are left out.
Williams, Waterman, Patterson: Roofline (Communications of the ACM 52/4, 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from orin_kit.models.spec import DecoderSpec


@dataclass(frozen=True)
class Device:
    """What a device can do.

    Attributes:
        bandwidth: of its memory, bytes a second.
        flops: dense FP16 multiplications and additions a second, the peak.
        bandwidth_share, compute_share: the least and the most of these peaks that is thought reachable.
        why: where the figures come from, a line each.
    """

    name: str
    bandwidth: float
    flops: float
    bandwidth_share: tuple[float, float]
    compute_share: tuple[float, float]
    why: tuple[str, ...]


AGX_ORIN_64GB = Device(
    name="Jetson AGX Orin 64GB",
    bandwidth=204.8e9,
    flops=42e12,
    bandwidth_share=(0.65, 0.85),
    compute_share=(0.3, 0.7),
    why=(
        "memory 204.8 GB/s LPDDR5 (NVIDIA's data sheet), 65 to 85 % of it reached: published decoding of Qwen3-1.7B "
        "with vLLM (embedl Edge-Inference-Benchmarks: 45.8 tokens/s in BF16, 101.0 in W4A16) comes to about 77 and "
        "67 %; 85 % is our guess at the best case",
        "arithmetic 42 TFLOP/s dense FP16 (our arithmetic from 2048 CUDA cores at 1.3 GHz), 30 to 70 % of it reached: "
        "an assumption without a source; weights of fewer bits are multiplied in FP16 too, FP32 would be slower",
    ),
)


class Span(BaseModel):
    """Milliseconds: at the device's peaks (no step can be faster), and between the most and the least reachable."""

    bound_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class Work:
    """What a decoder's steps cost, batch 1.

    Attributes:
        weight_bytes: of weights that one step reads.
        cache_bytes: of keys and values that one token of context adds; 0 for convolutions.
        state_bytes: of the convolution states; 0 for attention.
        token_flops: of the layers, for each token of the step, attention's own products apart.
        pair_flops: of attention, for each pair of a token and one it sees.
        head_flops: of the head, once a step: logits are computed for the last token alone.
    """

    weight_bytes: int
    cache_bytes: int
    state_bytes: int
    token_flops: int
    pair_flops: int
    head_flops: int

    def decode_bytes(self, context: int) -> int:
        """Read for one token after `context` others: weights once, the cache, the states."""
        return self.weight_bytes + context * self.cache_bytes + self.state_bytes

    def flops(self, tokens: int, context: int = 0) -> int:
        """Of a step of `tokens` after `context` others; a multiplication with its addition is two."""
        pairs = tokens * context + tokens * (tokens + 1) // 2
        return tokens * self.token_flops + pairs * self.pair_flops + self.head_flops


def work_of(spec: DecoderSpec, weight_bytes: int, cache_value_bytes: int) -> Work:
    """The work of a spec whose steps read `weight_bytes` of weights and keep `cache_value_bytes` a cached value."""
    linears = sum(rows * columns for rows, columns in spec.linear_shapes().values())
    kernel = spec.hidden_size * spec.conv_kernel_size
    return Work(
        weight_bytes=weight_bytes,
        cache_bytes=spec.kv_bytes_per_token(cache_value_bytes),
        state_bytes=spec.conv_state_bytes(cache_value_bytes),
        token_flops=2 * spec.num_hidden_layers * (linears + kernel),
        pair_flops=4 * spec.num_hidden_layers * spec.q_size,
        head_flops=2 * spec.vocab_size * spec.hidden_size,
    )


def tpot(work: Work, context: int, device: Device = AGX_ORIN_64GB) -> Span:
    """Time of one decoded token after `context` others."""
    return _span(work.decode_bytes(context), work.flops(1, context), device)


def ttft(work: Work, prompt_length: int, device: Device = AGX_ORIN_64GB) -> Span:
    """Time of the prefill of a fresh prompt, with the first token's logits: weights are read once, the cache written.

    Embedding rows and activations are left out.
    """
    written = prompt_length * work.cache_bytes + work.state_bytes
    return _span(work.weight_bytes + written, work.flops(prompt_length), device)


def _span(moved: int, flops: int, device: Device) -> Span:
    """The longer of moving bytes and computing, as one hides behind the other."""

    def milliseconds(bandwidth_share: float, compute_share: float) -> float:
        return 1e3 * max(moved / device.bandwidth / bandwidth_share, flops / device.flops / compute_share)

    (least, most), (slowest, fastest) = device.bandwidth_share, device.compute_share
    span = Span(bound_ms=milliseconds(1, 1), low_ms=milliseconds(most, fastest), high_ms=milliseconds(least, slowest))
    return span
