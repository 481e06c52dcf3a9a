"""Which linears of a layer are one in the graph: those that read the same input lie side by side."""

from __future__ import annotations

from orin_kit.models.families import Layout
from orin_kit.models.spec import DecoderSpec


def fused_linears(layout: Layout) -> dict[str, tuple[str, ...]]:
    """A layer's linears as the graph calls them, and their parts; names below `model.layers.N.`, in order of use."""
    return {
        _together(layout.mixer_in, "qkv_proj"): layout.mixer_in,
        layout.mixer_out: (layout.mixer_out,),
        _together((layout.gate, layout.up), "gate_up_proj"): (layout.gate, layout.up),
        layout.down: (layout.down,),
    }


def fused_shape(spec: DecoderSpec, parts: tuple[str, ...]) -> tuple[int, int]:
    """`(out_features, in_features)` of parts side by side."""
    shapes = [spec.linear_shapes()[part] for part in parts]
    return sum(rows for rows, _ in shapes), shapes[0][1]


def lora_names(linear: str) -> tuple[str, str]:
    """The graph's inputs of a linear's adapter: A `[in, rank]` and B `[rank, out]`."""
    return f"lora_A.{linear}", f"lora_B.{linear}"


def _together(parts: tuple[str, ...], name: str) -> str:
    return parts[0] if len(parts) == 1 else f"{parts[0].rpartition('.')[0]}.{name}"
