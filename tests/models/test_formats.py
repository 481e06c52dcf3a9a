"""Checkpoints as AutoAWQ, GPTQ and llm-compressor write them: read, and exported against transformers."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import formats
from formats import AWQ, Rounded, compressed_config, gptq_config, rounded, save_quantized
from orin_kit.data.packing import Example
from orin_kit.errors import ArtifactError, UnsupportedModelError
from orin_kit.export.export import export
from orin_kit.inspect.inspect import inspect
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.registry import read_format
from orin_kit.quantize.perplexity import perplexity
from orin_kit.runtime.runtime import open_runtime


def save(directory: Path, case: str, family: str = "qwen2") -> PreTrainedModel:
    """A checkpoint of a case below: "FORMAT BITS GROUP" and traits."""
    form, bits, size, *traits = case.split()
    symmetric, ordered, group = "sym" in traits, "ordered" in traits, None if size == "channel" else int(size)
    rng = np.random.default_rng()
    orders: dict[int, NDArray[np.int64]] = {}

    def round_linear(name: str, weight: NDArray[Any]) -> Rounded:
        columns = weight.shape[1]
        # As in real checkpoints, linears that read the same input have one order.
        order = orders.setdefault(columns, rng.permutation(columns)) if ordered else None
        return rounded(weight, int(bits), group or columns, symmetric=symmetric, order=order)

    if form == "awq":
        config = AWQ | {"group_size": group, "zero_point": not symmetric}
        return save_quantized(directory, family, config, round_linear, formats.awq_tensors)
    if form == "gptq":
        v2 = "v2" in traits
        config = gptq_config(int(bits), group or -1, desc_act=ordered, sym=symmetric)
        config["checkpoint_format"] = "gptq_v2" if v2 else "gptq"
        pack = lambda name, weight: formats.gptq_tensors(name, weight, v2=v2)  # noqa: E731
        return save_quantized(directory, family, config, round_linear, pack)
    config = compressed_config(int(bits), group, symmetric=symmetric, actorder="group" if ordered else None)
    if "named" in traits:  # a second group by regular expression, and the head by one too
        first = config["config_groups"]["group_0"]
        config["config_groups"] = {
            "group_0": copy.deepcopy(first) | {"targets": ["re:.*self_attn.*"]},
            "group_1": copy.deepcopy(first) | {"targets": ["re:.*mlp.*"]},
        }
        config["ignore"] = ["re:.*lm_head"]
    pack = lambda name, weight: formats.compressed_tensors(name, weight, symmetric=symmetric, g_idx=ordered)  # noqa: E731
    return save_quantized(directory, family, config, round_linear, pack)


CASES = [
    "awq 4 128", "awq 4 64 sym",
    "gptq 4 128 sym", "gptq 4 128 sym ordered", "gptq 4 64", "gptq 4 64 v2 ordered", "gptq 8 32",
    "gptq 8 channel sym v2",
    "compressed 4 128 sym", "compressed 4 32", "compressed 8 64", "compressed 8 channel sym", "compressed 4 channel",
    "compressed 4 128 ordered", "compressed 4 64 named",
]  # fmt: skip
ASYMMETRIC = {case for case in CASES if "sym" not in case}


@pytest.mark.parametrize("case", CASES)
def test_linears_read_as_the_format_defines_them(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, case)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check_complete()
    bits, size = int(case.split()[1]), case.split()[2]
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        np.testing.assert_allclose(checkpoint.float32(f"{name}.weight"), module.weight.detach(), rtol=2e-7, atol=1e-12)
        packing, packed = checkpoint.packing(name), checkpoint.packed(name)
        assert packing is not None and packing.shape == packed.shape == module.weight.shape
        group = module.weight.shape[1] if size == "channel" else int(size)
        assert (packing.bits, packing.group_size) == (packed.bits, packed.group_size) == (bits, group)
        assert packing.has_zero_points == (packed.zero_points is not None) == (case in ASYMMETRIC)
        assert packing.has_order == (packed.order is not None) == ("ordered" in case)
    assert not checkpoint.is_packed("lm_head")
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.bias"):
        assert torch.equal(torch.from_numpy(checkpoint.float32(name)), model.state_dict()[name])


def logits(model: PreTrainedModel, ids: NDArray[Any]) -> NDArray[Any]:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


@pytest.mark.parametrize(
    ("case", "family"),
    [
        ("awq 4 128", "qwen2"),
        ("awq 4 64 sym", "llama3"),
        ("gptq 4 128 sym ordered", "llama-biased-linear"),
        ("gptq 8 32", "qwen3"),
        ("compressed 4 32", "mistral"),
        ("compressed 4 128 ordered", "qwen2-untied-yarn"),
        ("compressed 8 channel sym", "qwen2"),
    ],
)
def test_dequantized_export_computes_what_transformers_does(case: str, family: str, tmp_path: Path) -> None:
    model = save(tmp_path / "hf", case, family)
    export(tmp_path / "hf", tmp_path / "onnx", precision="fp32", progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 20))
    got = open_runtime(tmp_path / "onnx", max_len=64).backend.score(ids)
    assert np.abs(got - logits(model, ids)).max() <= 1e-3


PACKED = ["awq 4 128", "gptq 4 128 sym ordered", "gptq 4 64 v2 ordered", "gptq 8 32", "compressed 8 64"]


@pytest.mark.parametrize("case", [*PACKED, "compressed 4 32", "compressed 4 64 named", "compressed 8 channel sym"])
def test_packed_export_keeps_the_codes(case: str, tmp_path: Path) -> None:
    """Within what int8 activations (accuracy level 4) cost."""
    model = save(tmp_path / "hf", case)
    export(tmp_path / "hf", tmp_path / "onnx", progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 40))
    got, expected = open_runtime(tmp_path / "onnx", max_len=64).backend.score(ids), logits(model, ids)
    assert float(np.sqrt(np.mean((got - expected) ** 2)) / expected.std()) < 0.08


@pytest.mark.parametrize("case", ["awq 4 128", "gptq 4 64 v2 ordered", "compressed 8 64"])
def test_perplexity_is_that_of_the_dequantized_model(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, case)
    ids = np.random.default_rng().integers(0, 2048, (4, 24))
    found = perplexity(tmp_path, [Example(row.tolist(), [True] * 24) for row in ids])
    scores = torch.log_softmax(torch.from_numpy(logits(model, ids)).double(), -1)[:, :-1]
    expected = scores.gather(-1, torch.from_numpy(ids)[:, 1:, None]).mean()
    assert np.log(found) == pytest.approx(-float(expected), rel=1e-4)


@pytest.mark.parametrize("case", ["awq 4 128", "gptq 8 32", "gptq 4 64 v2 ordered", "compressed 4 32"])
def test_inspect_counts_what_is_stored(case: str, tmp_path: Path) -> None:
    model = save(tmp_path, case)
    found = inspect(tmp_path)
    assert found.mismatches == [] and found.model is not None
    assert found.model.group_size == int(case.split()[2])
    assert found.model.stored_parameters == sum(p.numel() for p in model.parameters())
    dtypes = {row.kind: row.dtypes for row in found.model.kinds}
    assert dtypes["mixer"] == dtypes["mlp"] == [f"INT{case.split()[1]}"] and dtypes["embedding"] == ["F16"]


@pytest.mark.parametrize("case", [c for c in CASES if "compressed" in c and "ordered" not in c])
def test_transformers_reads_the_same(case: str, tmp_path: Path) -> None:
    """That the test's own checkpoints are what compressed-tensors means. It no longer reads act-order itself."""
    model = save(tmp_path, case)
    # Kept compressed, transformers 5.24 expects zero points that are not packed.
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config).eval()
    ids = np.random.default_rng().integers(0, 2048, (1, 20))
    assert np.abs(logits(theirs, ids) - logits(model, ids)).max() <= 1e-2  # it rounds the weights to fp16


@pytest.mark.parametrize("case", ["awq 4 128", "awq 4 64 sym"])
def test_awq_reads_as_compressed_tensors_converts_it(case: str, tmp_path: Path) -> None:
    save(tmp_path / "awq", case)
    config = json.loads((tmp_path / "awq/config.json").read_text())
    stored = load_file(tmp_path / "awq/model.safetensors")
    converter = AutoAWQConverter.from_autoawq_config(config["quantization_config"])
    config["quantization_config"] = json.loads(converter.update_config(None).model_dump_json())
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted/config.json").write_text(json.dumps(config))
    save_file(converter.process(dict(stored)), tmp_path / "converted/model.safetensors")
    ours, theirs = Checkpoint(tmp_path / "awq"), Checkpoint(tmp_path / "converted")
    for name in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        one, other = ours.packed(name), theirs.packed(name)
        np.testing.assert_array_equal(one.packed, other.packed)
        np.testing.assert_array_equal(one.scales, other.scales)
        np.testing.assert_array_equal(one.zero_points, other.zero_points)


def test_zero_points_of_zero_that_gptqmodel_borrowed_for(tmp_path: Path) -> None:
    """GPTQModel turns its own format into the first one by a subtraction of whole words."""
    save(tmp_path / "v2", "gptq 4 64 v2")
    shutil.copytree(tmp_path / "v2", tmp_path / "v1")
    stored = load_file(tmp_path / "v2/model.safetensors")
    names = [name for name in stored if name.endswith("qzeros")]
    stored |= {name: torch.randint(-(2**31), 2**31, stored[name].shape, dtype=torch.int32) for name in names}
    save_file(stored, tmp_path / "v2/model.safetensors")
    save_file(stored | {name: stored[name] - 0x11111111 for name in names}, tmp_path / "v1/model.safetensors")
    config = json.loads((tmp_path / "v1/config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (tmp_path / "v1/config.json").write_text(json.dumps(config))
    for name in names:
        linear = name.removesuffix(".qzeros")
        first, second = (Checkpoint(tmp_path / version).packed(linear).zero_points for version in ("v1", "v2"))
        np.testing.assert_array_equal(first, second)
        assert second is not None and (second == 0).any()


@pytest.mark.parametrize(
    ("case", "part", "change", "said"),
    [
        ("awq 4 128", "qweight", lambda t: t[:-1], "has a qweight"),
        ("awq 4 128", "qzeros", lambda t: t[:, 1:], "has qzeros"),
        ("awq 4 128", "scales", lambda t: t * torch.nan, "has scales that are NaN"),
        ("gptq 4 128 sym", "scales", lambda t: t[:, 1:], "has a qweight"),
        ("gptq 4 128 sym", "g_idx", lambda t: t * 0, "has a g_idx that is not 3 groups of 128"),
        ("gptq 4 128 sym", "qzeros", lambda t: t[1:], "has qzeros"),
        ("compressed 4 128 sym", "weight_shape", lambda t: t * 2, r"is said to be \[768, 768\]"),
        ("compressed 4 32", "weight_zero_point", lambda t: t[1:], "has zero points"),
        ("compressed 4 32", "weight_scale", lambda t: t[:, ::2].clone(), "has 4 bits in groups of 64, which no config"),
        ("compressed 4 128 ordered", "weight_g_idx", lambda t: t[1:], "has a g_idx of"),
    ],
)
def test_tensors_that_contradict_each_other(case: str, part: str, change: Any, said: str, tmp_path: Path) -> None:
    save(tmp_path, case)
    state, name = load_file(tmp_path / "model.safetensors"), f"model.layers.1.self_attn.q_proj.{part}"
    save_file(state | {name: change(state[name]).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"layers\.1\.self_attn\.q_proj " + said):
        Checkpoint(tmp_path).packed("model.layers.1.self_attn.q_proj")


def test_biases_of_zeros_that_autogptq_adds_are_left_out(tmp_path: Path) -> None:
    model = save(tmp_path / "hf", "gptq 4 128 sym")
    state = load_file(tmp_path / "hf/model.safetensors")
    bias = "model.layers.0.mlp.up_proj.bias"
    save_file(state | {bias: torch.zeros(640, dtype=torch.float16)}, tmp_path / "hf/model.safetensors")
    Checkpoint(tmp_path / "hf").check_complete()
    export(tmp_path / "hf", tmp_path / "onnx", precision="fp32", progress=False)
    ids = np.random.default_rng().integers(0, 2048, (1, 20))
    got = open_runtime(tmp_path / "onnx", max_len=64).backend.score(ids)
    assert np.abs(got - logits(model, ids)).max() <= 1e-3
    save_file(state | {bias: torch.ones(640, dtype=torch.float16)}, tmp_path / "hf/model.safetensors")
    with pytest.raises(UnsupportedModelError, match="up_proj.bias is a bias that qwen2 does not have"):
        Checkpoint(tmp_path / "hf")


GPTQ = gptq_config(4, 128)
COMPRESSED = compressed_config(4, 128, symmetric=True)
GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("config", "path", "value"),
    [
        (AWQ, ("quant_method",), "bitsandbytes"),
        (AWQ, ("bits",), 3),
        (AWQ, ("version",), "gemv"),
        (AWQ, ("backend",), "llm-awq"),
        (GPTQ, ("bits",), 3),
        (GPTQ, ("checkpoint_format",), "marlin"),
        (GPTQ, ("pack_dtype",), "int16"),
        (GPTQ, ("adapter",), {"name": "lora"}),
        (COMPRESSED, ("format",), "int-quantized"),
        (COMPRESSED, ("kv_cache_scheme",), {"num_bits": 8, "type": "float"}),
        (COMPRESSED, ("config_groups",), {}),
        (COMPRESSED, ("sparsity_config",), {"format": "sparse-24-bitmask"}),
        (COMPRESSED, ("transform_config",), {"config_groups": {"u": {"type": "hadamard"}}}),
        (COMPRESSED, (*GROUP, "targets"), []),
        (COMPRESSED, (*GROUP, "format"), "nvfp4-pack-quantized"),
        (COMPRESSED, (*GROUP, "input_activations"), {"num_bits": 8}),
        (COMPRESSED, (*GROUP, "weights", "num_bits"), 3),
        (COMPRESSED, (*GROUP, "weights", "strategy"), "tensor"),
        (COMPRESSED, (*GROUP, "weights", "group_size"), None),
        (COMPRESSED, (*GROUP, "weights", "type"), "float"),
        (COMPRESSED, (*GROUP, "weights", "dynamic"), True),
    ],
)
def test_what_is_not_read_is_refused_by_field(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    read_format(config)
    config = copy.deepcopy(config)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UnsupportedModelError, match=path[-1]):
        read_format(config)
