"""The formats of quantized checkpoints that are read, by what config.json calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orin_kit.models.formats.awq import Awq
from orin_kit.models.formats.compressed_tensors import CompressedTensors
from orin_kit.models.formats.format import Format, unsupported
from orin_kit.models.formats.gptq import Gptq

FORMATS: dict[str, type[Format]] = {"compressed-tensors": CompressedTensors, "awq": Awq, "gptq": Gptq}


def read_format(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint whose config.json has this `quantization_config`.

    Raises:
        UnsupportedModelError: another method, or a field that its format does not read.
    """
    method = config.get("quant_method")
    if method not in FORMATS:
        raise unsupported("quant_method", method, " or ".join(FORMATS))
    return FORMATS[method].from_config(config)
