"""Rotary frequencies against transformers' own functions."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from families import COMMON, LINEAR, LLAMA3, YARN
from orin_kit.errors import UnsupportedModelError
from orin_kit.models.rope import read_rope

YARNS = [
    YARN,
    YARN | {"beta_fast": 16, "beta_slow": 2},
    YARN | {"attention_factor": 1.3},
    YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
    YARN | {"truncate": False},
]


@pytest.mark.parametrize("parameters", [LLAMA3, LINEAR, *YARNS], ids=lambda p: "-".join(map(str, p.values())))
def test_scaled_frequencies_equal_transformers(parameters: dict) -> None:
    config = AutoConfig.for_model("llama", **COMMON, rope_parameters=parameters)
    inverse, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    ours, our_factor = read_rope(config.to_dict(), "test").frequencies(64)
    np.testing.assert_allclose(ours, inverse.double().numpy(), rtol=3e-6)
    assert our_factor == pytest.approx(factor)


def test_old_and_new_field_names_mean_the_same() -> None:
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old = read_rope({"rope_theta": 500000.0, "rope_scaling": scaling}, "old")
    assert old == read_rope({"rope_parameters": LLAMA3}, "new")


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rope_type": "longrope"}, "longrope"),
        ({"rope_type": "linear"}, "factor"),
        ({**YARN, "surprise": 1}, "surprise"),
        ([1], "JSON object"),
    ],
)
def test_what_is_not_known_is_refused_by_name(parameters: object, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read_rope({"rope_parameters": parameters}, "config.json")
