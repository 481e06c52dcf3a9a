"""What inspect counts of packed weights in every dialect and format, against sums over the files and the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import formats
from families import save_model
from orin_kit.cli import cli
from orin_kit.export.export import export
from orin_kit.inspect.inspect import inspect
from orin_kit.inspect.inspection import Inspection, Model
from orin_kit.quantize.quantize import quantize

RNG = np.random.default_rng()
SIZES = dict(
    vocab_size=2048 + 16 * int(RNG.integers(1, 30)),  # the demo tokenizer has 2048 tokens
    hidden_size=128 * int(RNG.integers(1, 4)),
    intermediate_size=128 * int(RNG.integers(1, 5)),
    num_hidden_layers=int(RNG.integers(1, 4)),
)
VOCAB, HIDDEN, LAYERS = (SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers"))
HEADS, HEAD_DIM, TABLE = 2, 64, SIZES["vocab_size"] * SIZES["hidden_size"]
QUANTIZED: dict[str, dict[str, Any]] = {
    # what of it the checkpoint is called: how it is quantized
    "int4": dict(group_size=64, embedding_bits=4, kv_bits=8, samples=4, sample_length=48),  # one table, int8 cache
    "asym4": dict(group_size=32, symmetric=False, embedding_bits=4),
    "asym8": dict(bits=8, group_size=128, symmetric=False, embedding_bits=8),
    "mixed": dict(group_size=128, head_bits=8, embedding_bits=4),  # two tables
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model of random sizes in fp32, and quantized."""
    home = tmp_path_factory.mktemp("packed")
    save_model(home / "hf", "qwen3", **SIZES)
    for name, options in QUANTIZED.items():
        quantize(home / "hf", home / name, method="rtn", perplexity=False, **options)
    return home


@pytest.fixture(scope="module")
def parameters(home: Path) -> int:
    """By torch, the tied table once."""
    return sum(tensor.numel() for tensor in load_file(home / "hf/model.safetensors").values())


def looked_at(directory: Path, **options: Any) -> tuple[Inspection, Model]:
    found = inspect(directory, **options)
    assert found.mismatches == [] and found.model is not None
    return found, found.model


def stored(directory: Path) -> dict[str, int]:
    """Bytes of the graph's initializers, those that lie in the same place only once."""
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    places, sizes = set(), {}
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        place = where.get("offset", tensor.name)
        if place not in places:
            bits = {onnx.TensorProto.INT4: 4}.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(
                tensor.data_type
            ).itemsize
            sizes[tensor.name] = int(where.get("length", int(np.prod(tensor.dims)) * bits // 8))
        places.add(place)
    return sizes


# Checkpoint, what export is told, tables it stores, bytes of an embedding's row, bytes of a cached value.
E4, E8 = HIDDEN // 2, HIDDEN
GRAPHS: dict[str, tuple[str, dict[str, Any], int, int, int]] = {
    "ort": ("int4", {}, 1, E4 + HIDDEN // 64 * 4, 1),
    "ort, two tables": ("int4", dict(tie=False), 2, E4 + HIDDEN // 32 * 4, 1),
    "ort, one step": ("hf", dict(precision="int4"), 1, E4 + HIDDEN // 128 * 4, 4),
    "ort, one step, two tables": ("hf", dict(precision="int4", tie=False, group_size=32), 2, E4 + HIDDEN // 32 * 4, 4),
    "ort, fp16, 8-bit table": ("int4", dict(activations="fp16", embedding_bits=8), 2, E8 + HIDDEN // 32 * 2, 1),
    "ort, zero points": ("asym4", {}, 1, E4 + HIDDEN // 32 * 4 + HIDDEN // 32 // 2, 4),
    "ort, 8 bits, zero points": ("asym8", {}, 1, E8 + HIDDEN // 128 * 4 + HIDDEN // 128, 4),
    "ort, head of 8 bits": ("mixed", dict(activations="fp16"), 2, E4 + HIDDEN // 32 * 2, 2),
    "ort, bf16": ("hf", dict(precision="bf16"), 1, HIDDEN * 2, 2),
    "ort, dequantized": ("int4", dict(precision="fp16"), 2, HIDDEN * 2, 1),
    "trt_plugin": ("int4", dict(dialect="trt_plugin"), 1, E4 + HIDDEN // 64 * 2, 1),
    "trt_plugin, two tables": ("int4", dict(dialect="trt_plugin", embedding_bits=8), 2, E8 + HIDDEN // 32 * 2, 1),
    "trt_plugin, fp16 cache": ("mixed-head4", dict(dialect="trt_plugin"), 2, E4 + HIDDEN // 32 * 2, 2),
    "trt_native": ("int4", dict(dialect="trt_native", embedding_bits=8), 2, E8 + HIDDEN // 32 * 2, 1),
    "trt_native, layer": ("int4", dict(dialect="trt_native", embedding_bits=16, kv_update="layer"), 2, HIDDEN * 2, 1),
    "reference": ("int4", dict(dialect="reference", embedding_bits=16), 2, HIDDEN * 2, 1),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_graphs(case: str, home: Path, parameters: int, tmp_path: Path) -> None:
    checkpoint, options, tables, row, cached = GRAPHS[case]
    if checkpoint == "mixed-head4":
        quantize(home / "hf", home / checkpoint, method="rtn", perplexity=False, embedding_bits=16, overwrite=True)
        options = dict(options, embedding_bits=4, tie=False)
    export(home / checkpoint, tmp_path / "onnx", max_len=128, progress=False, **options)
    found, model = looked_at(tmp_path / "onnx", context=100)
    sizes = stored(tmp_path / "onnx")
    assert model.weights_bytes == sum(sizes.values())
    assert model.stored_parameters == parameters + (TABLE if tables == 2 else 0)
    assert model.parameters == parameters + (TABLE if tables == 2 and not model.tied else 0)
    assert ("head" in {kind.kind for kind in model.kinds}) == (tables == 2)
    assert found.graph is not None and sum(i.bytes for i in found.graph.initializers) == sum(sizes.values())

    head = ("lm_head.",) if any(name.startswith("lm_head.") for name in sizes) else ("lm_head.", "model.embed_tokens.")
    read = sum(size for name, size in sizes.items() if name.startswith(("model.layers.", "model.norm.", *head)))
    rotary = sum(size // 128 for name, size in sizes.items() if name.startswith("rotary."))
    assert model.token_bytes == read + row + rotary
    assert model.kv_bytes_per_token == 2 * LAYERS * HEADS * HEAD_DIM * cached
    assert model.kv_scale_bytes == (2 * LAYERS * HEADS * HEAD_DIM * 4 if cached == 1 else 0)
    assert found.predictions[0].decode_bytes == model.token_bytes + 100 * model.kv_bytes_per_token
    assert found.predictions[0].tpot.bound_ms == pytest.approx(found.predictions[0].decode_bytes / 204.8e9 * 1e3)
    in_place = options.get("dialect", "ort") in ("ort", "trt_plugin") or options.get("kv_update") == "layer"
    assert found.graph.copies_cache == (not in_place)

    (tmp_path / "onnx/orin_kit.json").unlink()  # nothing but the graph says it now
    again, without = looked_at(tmp_path / "onnx", context=100)
    assert without == model and again.predictions == found.predictions
    assert again.graph is not None and again.graph.dialect == options.get("dialect", "ort")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("ort", [(4, 64, False, 4 * LAYERS + 1)]),
        ("ort, 8 bits, zero points", [(8, 128, True, 4 * LAYERS + 1)]),
        ("ort, zero points", [(4, 32, True, 4 * LAYERS + 1)]),
        ("ort, head of 8 bits", [(4, 128, False, 4 * LAYERS), (8, 128, False, 1), (4, 32, False, 1)]),
        ("trt_plugin, two tables", [(4, 64, False, 4 * LAYERS + 1), (8, 32, False, 1)]),
        ("trt_native", [(4, 64, False, 4 * LAYERS + 1), (8, 32, False, 1)]),
        ("reference", [(4, 64, False, 4 * LAYERS + 1)]),
        ("ort, bf16", []),
    ],
)
def test_how_graphs_are_packed(case: str, expected: list[tuple[Any, ...]], home: Path, tmp_path: Path) -> None:
    checkpoint, options, *_ = GRAPHS[case]
    export(home / checkpoint, tmp_path / "onnx", progress=False, **options)
    _, model = looked_at(tmp_path / "onnx")
    got = [(p.bits, p.group_size, p.zero_points, p.count) for p in model.packings]
    assert sorted(got) == sorted(expected) and model.group_size == (expected[0][1] if expected else None)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_checkpoints(name: str, home: Path, parameters: int) -> None:
    options = {"bits": 4, "symmetric": True, "kv_bits": 16, **QUANTIZED[name]}
    _, model = looked_at(home / name)
    with safe_open(home / name / "model.safetensors", "np") as file:
        sizes = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    assert model.weights_bytes == sum(sizes.values())
    assert model.quantization == "compressed-tensors"
    assert model.stored_parameters == parameters + TABLE  # the packed head, and the table that transformers loads
    assert model.parameters == parameters + (0 if name != "mixed" else TABLE)
    first = model.packings[0]
    assert (first.bits, first.group_size) == (options["bits"], options["group_size"])
    assert first.zero_points == (not options["symmetric"])
    assert model.kv_scale_bytes == sum(size for key, size in sizes.items() if key.endswith(("k_scale", "v_scale")))
    cached = 1 if options["kv_bits"] == 8 else 2
    assert model.kv_bytes_per_token == 2 * LAYERS * HEADS * HEAD_DIM * cached


@pytest.mark.parametrize(
    ("granularity", "scales"), [("channel", HEADS * HEAD_DIM * 4), ("head", HEADS * 2), ("tensor", 2)]
)
def test_scales_of_an_int8_cache(granularity: str, scales: int, home: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = dict(method="rtn", perplexity=False, kv_bits=8, samples=4, sample_length=48)
    quantize(home / "hf", tmp_path / "q", kv_scales=granularity, **how)
    _, model = looked_at(tmp_path / "q")
    assert (model.cache_dtype, model.kv_scale_bytes) == ("I8", 2 * LAYERS * scales)


@pytest.mark.parametrize(
    ("checkpoint", "form", "options"),
    [
        ("int4", "exported, one table", {}),
        ("asym8", "exported, one table", {}),
        ("mixed", "exported, INT4 embedding", {}),
        ("hf", "FP16", dict(precision="fp16")),
        ("hf", "INT4, group 128, head too", dict(precision="int4", embedding_bits=16)),
        ("hf", "the same, one INT4 table", dict(precision="int4")),
    ],
)
def test_what_is_predicted_of_a_form_is_what_export_makes(
    checkpoint: str, form: str, options: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    export(home / checkpoint, tmp_path / "onnx", activations="fp16", progress=False, **options)
    found, _ = looked_at(home / checkpoint)
    made, _ = looked_at(tmp_path / "onnx")
    [said] = [prediction for prediction in found.predictions if prediction.form == form]
    rotary = 2 * HEAD_DIM // 2 * 2  # a row of cos and sin each, which no checkpoint has
    assert made.predictions[0].decode_bytes == said.decode_bytes + rotary


def test_an_embedding_packed_beside_a_tied_plain_head(home: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = dict(method="rtn", perplexity=False, lm_head=False, embedding_bits=8)
    quantize(home / "hf", tmp_path / "q", **how)
    export(tmp_path / "q", tmp_path / "onnx", activations="fp16", progress=False)
    found, _ = looked_at(tmp_path / "q")
    made, model = looked_at(tmp_path / "onnx")
    sizes = stored(tmp_path / "onnx")
    assert model.weights_bytes == sum(sizes.values()) and sizes["model.embed_tokens.weight"] == TABLE * 2
    said = found.predictions[1]
    assert said.form == "exported, INT8 embedding"
    assert made.predictions[0].decode_bytes == said.decode_bytes + 2 * HEAD_DIM // 2 * 2


@pytest.mark.parametrize(
    ("asked", "targets", "features"),
    [
        (["q_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "down_proj"], "qkv down"),
        (["o_proj"], ["o_proj"], "o"),
        (["all"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "qkv o gate_up down"),
    ],
)
def test_adapters(asked: list[str], targets: list[str], features: str, home: Path, tmp_path: Path) -> None:
    inner, q = SIZES["intermediate_size"], 6 * HEAD_DIM
    sizes = {"qkv": HIDDEN + q + 2 * HEADS * HEAD_DIM, "o": q + HIDDEN, "gate_up": HIDDEN + 2 * inner,
             "down": inner + HIDDEN}  # fmt: skip
    expected = LAYERS * sum(sizes[name] for name in features.split())
    for precision, dtype, size in (("bf16", "BF16", 2), ("int4", "F32", 4)):
        out = tmp_path / precision
        export(home / "hf", out, precision=precision, lora_targets=asked, progress=False)
        found, _ = looked_at(out)
        assert found.graph is not None and (adapters := found.graph.adapters) is not None
        assert (adapters.targets, adapters.dtype, adapters.bytes_per_rank) == (targets, dtype, size * expected)
        assert adapters.linears == LAYERS * len(features.split())
        assert any("adapter" in line for line in found.assumptions)


def test_what_is_printed(home: Path, tmp_path: Path) -> None:
    export(home / "int4", tmp_path / "onnx", lora_targets=["o_proj"], progress=False)
    said = " ".join(CliRunner().invoke(cli, ["inspect", str(tmp_path / "onnx")]).output.split())
    assert "model.embed_tokens.weight_packed is the bytes of lm_head.weight_packed" in said
    assert f"LoRA of any rank for o_proj: {LAYERS} linears" in said
    assert f"INT4 in groups of 64 ({4 * LAYERS + 1}: mixer, mlp, embedding)" in said
    assert f"{2 * LAYERS * HEADS * HEAD_DIM:,} bytes a token (I8)" in said and "scales" in said
    said = " ".join(CliRunner().invoke(cli, ["inspect", str(home / "asym8")]).output.split())
    assert "quantized compressed-tensors" in said and "INT8 in groups of 128 with zero points" in said
    assert "one table, stored packed and dequantized" in said


def save_foreign(directory: Path, case: str) -> PreTrainedModel:
    """A checkpoint as others write it: "awq 4 128", "gptq 8 32 ordered", "compressed 4 32"."""
    form, bits, size, *more = case.split()
    width, ordered, symmetric = int(bits), "ordered" in more, "sym" in more
    config: dict[str, Any] = {
        "awq": dict(formats.AWQ, group_size=int(size)),
        "gptq": formats.gptq_config(width, int(size), desc_act=ordered, sym=symmetric),
        "compressed": formats.compressed_config(width, int(size), symmetric=symmetric),
    }[form]

    def round_linear(_: str, weight: np.ndarray) -> formats.Rounded:
        order = RNG.permutation(weight.shape[1]) if ordered else None
        return formats.rounded(weight, width, int(size), symmetric=symmetric, order=order)

    def tensors(name: str, weight: formats.Rounded) -> dict[str, torch.Tensor]:
        if form == "compressed":
            return formats.compressed_tensors(name, weight, symmetric=symmetric)
        return formats.awq_tensors(name, weight) if form == "awq" else formats.gptq_tensors(name, weight)

    return formats.save_quantized(directory, "qwen2", config, round_linear, tensors, **SIZES)


@pytest.mark.parametrize(
    "case",
    ["awq 4 128", "awq 4 64 sym", "gptq 4 128 sym", "gptq 8 32 ordered", "compressed 4 32", "compressed 8 64 sym"],
)
def test_checkpoints_of_others_and_their_exports(case: str, tmp_path: Path) -> None:
    model = save_foreign(tmp_path / "hf", case)
    total = sum(parameter.numel() for parameter in model.parameters())
    found, plain = looked_at(tmp_path / "hf")
    bits, size = (int(number) for number in case.split()[1:3])
    sizes = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "hf/model.safetensors").items()}
    assert plain.weights_bytes == sum(sizes.values()) and plain.stored_parameters == plain.parameters == total
    [packing] = plain.packings
    assert (packing.bits, packing.group_size, packing.count) == (bits, size, 7 * LAYERS)
    assert (packing.zero_points, packing.order) == ("sym" not in case, "ordered" in case)
    assert plain.quantization == case.partition(" ")[0].replace("compressed", "compressed-tensors")
    assert [prediction.form for prediction in found.predictions] == ["as stored"]
    if "ordered" in case:  # q, k and v in orders of their own do not go side by side
        return
    export(tmp_path / "hf", tmp_path / "onnx", progress=False)
    _, graph = looked_at(tmp_path / "onnx")
    assert graph.weights_bytes == sum(stored(tmp_path / "onnx").values())
    assert graph.stored_parameters == graph.parameters == total
    [packing] = graph.packings
    assert (packing.bits, packing.group_size, packing.zero_points) == (bits, size, "sym" not in case)


def test_biases_of_zeros_are_no_parameters(tmp_path: Path) -> None:
    save_foreign(tmp_path, "gptq 4 128 sym")
    _, before = looked_at(tmp_path)
    file = tmp_path / "model.safetensors"
    state, bias = load_file(file), "model.layers.0.mlp.up_proj.bias"
    zeros = torch.zeros(SIZES["intermediate_size"], dtype=torch.float16)
    save_file(state | {bias: zeros}, file, metadata={"format": "pt"})
    _, after = looked_at(tmp_path)
    assert after.stored_parameters == before.stored_parameters and after.token_bytes == before.token_bytes
    assert after.weights_bytes == before.weights_bytes + zeros.nbytes
    save_file(state | {bias: zeros + 1}, file, metadata={"format": "pt"})
    assert f"1 tensors do not belong to the family, e.g. {bias}" in "\n".join(inspect(tmp_path).mismatches)


@pytest.mark.parametrize("dialect", ["ort", "trt_plugin", "trt_native"])
def test_a_packed_graph_of_another_config_is_said(dialect: str, home: Path, tmp_path: Path) -> None:
    export(home / "int4", tmp_path / "onnx", dialect=dialect, embedding_bits=8, progress=False)
    config = tmp_path / "onnx/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": VOCAB // 2}))
    (tmp_path / "onnx/orin_kit.json").unlink()
    said = "\n".join(inspect(tmp_path / "onnx").mismatches)
    for table in ("embedding", "head"):
        assert f"{table}: config.json says {TABLE // 2:,} parameters, files hold {TABLE:,}" in said
