"""What `orin-kit quantize` can be asked for, and what does not go together."""

from __future__ import annotations

from dataclasses import dataclass

from orin_kit.errors import UserError
from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.models.spec import DecoderSpec
from orin_kit.quantize.kv_layout import GRANULARITIES, Granularity

METHODS = ("awq", "gptq", "rtn")
WEIGHT_BITS = (4, 8)
TABLE_BITS = (16, 8, 4)
CACHE_BITS = (16, 8)


@dataclass(frozen=True)
class Options:
    """How a model is quantized; checked when made.

    Attributes:
        method: "awq", "gptq", or "rtn" (round to nearest).
        bits: of the decoder layers' linears, 4 or 8.
        group_size: input features that share a scale.
        symmetric: without zero points.
        head_bits: of the head, 16, 8 or 4; None: as the linears.
        embedding_bits: of the embedding table once exported, 16, 8 or 4.
        act_order: GPTQ rounds the columns with the largest inputs first.
        kv_bits: of the KV cache, 16 or 8.
        kv_scales: what shares a scale of an 8-bit cache.

    Raises:
        UserError: an option is not known, or does not go with another.
    """

    method: str = "awq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    head_bits: int | None = None
    embedding_bits: int = 16
    act_order: bool = False
    kv_bits: int = 16
    kv_scales: Granularity = "channel"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is not known", mend=f"use one of {', '.join(METHODS)}")
        if self.kv_scales not in GRANULARITIES:
            mend = f"use one of {', '.join(GRANULARITIES)}"
            raise UserError(f"scales for each {self.kv_scales!r} are not known", mend=mend)
        for what, value, known in (
            ("weights of {} bits", self.bits, WEIGHT_BITS),
            ("a head of {} bits", self.head_bits, (None, *TABLE_BITS)),
            ("embedding bits {}", self.embedding_bits, TABLE_BITS),
            ("a KV cache of {} bits", self.kv_bits, CACHE_BITS),
        ):
            if value not in known:
                *most, last = [str(bits) for bits in known if bits is not None]
                raise UserError(f"{what.format(value)} is not known", mend=f"use {', '.join(most)} or {last}")
        if self.act_order and self.method != "gptq":
            raise UserError(f"{self.method} has no act-order", mend="leave out --act-order or use --method gptq")
        if self.kv_scales != "channel" and self.kv_bits != 8:
            raise UserError(f"scales for each {self.kv_scales} are of an 8-bit KV cache", mend="add --kv-bits 8")

        if not self.symmetric and self.head_bits not in (None, 16, self.bits):
            # transformers unpacks zero points on loading only, and then takes one scheme for all linears.
            what = f"zero points, and a head of {self.head_bits} bits beside linears of {self.bits}, are not loaded"
            raise UserError(f"{what} by transformers", mend="use --symmetric or leave out --head-bits")

    @property
    def scheme(self) -> WeightScheme:
        """Of the decoder layers' linears."""
        return WeightScheme(self.bits, self.group_size, self.symmetric)

    @property
    def head(self) -> WeightScheme | None:
        """Of the head; None where it stays in fp16."""
        bits = self.bits if self.head_bits is None else self.head_bits
        return None if bits == 16 else WeightScheme(bits, self.group_size, self.symmetric)

    @property
    def cache(self) -> Granularity | None:
        """What shares a scale of the KV cache; None where it is not quantized."""
        return self.kv_scales if self.kv_bits == 8 else None

    def tied(self, spec: DecoderSpec) -> bool:
        """Whether head and embedding become one quantized table."""
        return spec.tie_word_embeddings and self.head is not None and self.head.bits == self.embedding_bits

    def check_model(self, spec: DecoderSpec) -> None:
        """Say what this model cannot have.

        Raises:
            UserError: it has no KV cache to quantize.
        """
        if self.kv_bits == 8 and spec.layout.mixer != "attention":
            raise UserError("a model of convolutions has no KV cache", mend="leave out --kv-bits")
