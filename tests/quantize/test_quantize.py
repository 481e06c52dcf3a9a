"""The verb, end to end: transformers loads what it writes, perplexities are transformers', bad input is named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import DEMO_TEACHER, save_model
from orin_kit.data.chat import write_chats
from orin_kit.data.tasks import distinct
from orin_kit.errors import ArtifactError, OrinKitError, UserError
from orin_kit.manifest import read_manifest
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.quantize.calibrate import read_samples
from orin_kit.quantize.quantize import quantize
from orin_kit.tokenizer import ChatTokenizer

SMALL: dict[str, Any] = dict(samples=4, sample_length=128)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen2"
    save_model(directory, "qwen2", num_hidden_layers=2)
    return directory


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words int32 `[n, m]` taken apart, lowest bits first."""
    fields = words[..., None] >> (bits * torch.arange(32 // bits, dtype=torch.int32)) & (2**bits - 1)
    return fields.flatten(1).double()


def reference(model: Path, quantized: Path) -> Any:
    """transformers' plain model with the artifact's weights, dequantized in this test's own arithmetic."""
    plain = load(model)
    tensors = load_file(quantized / "model.safetensors")
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            rows, columns = tensors[name.replace("packed", "shape")].tolist()
            bits = 32 * tensor.shape[1] // columns
            scales = tensors[name.replace("packed", "scale")].double()
            steps = codes(tensor, bits) - 2 ** (bits - 1)
            if (zeros := tensors.get(name.replace("packed", "zero_point"))) is not None:
                zeros = codes(zeros.T, bits).T[:rows] - 2 ** (bits - 1)
                steps -= zeros.repeat_interleave(columns // scales.shape[1], dim=1)
            assert list(steps.shape) == [rows, columns]
            weight = steps.view(rows, scales.shape[1], -1) * scales[..., None]
            state[name.removesuffix("_packed")] = weight.flatten(1).float()
        elif not name.endswith(("weight_scale", "weight_shape", "weight_zero_point")):
            assert tensor.dtype == torch.float16
            state[name] = tensor.float()
    if "lm_head.weight" in state:
        plain.lm_head.weight = torch.nn.Parameter(state["lm_head.weight"])  # not the embedding's any more
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return plain


@pytest.mark.parametrize(
    ("name", "method", "group_size", "lm_head"),
    [
        ("qwen2", "awq", 128, True),
        ("qwen2", "rtn", 32, False),
        ("qwen3", "awq", 64, True),
        ("llama-biased-linear", "awq", 128, False),
        ("mistral", "rtn", 128, True),
        ("conv", "awq", 64, True),
        ("conv-biased-untied", "awq", 128, False),
    ],
)
@torch.no_grad()
def test_transformers_loads_the_artifact(
    name: str, method: str, group_size: int, lm_head: bool, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", name, num_hidden_layers=2)
    options: dict[str, Any] = dict(method=method, group_size=group_size, lm_head=lm_head, perplexity=False)
    results = quantize(tmp_path / "model", tmp_path / "int4", **options, **SMALL)
    ids = torch.randint(0, 2048, (2, 40))
    loaded = load(tmp_path / "int4")
    logits = loaded(ids).logits
    expected = reference(tmp_path / "model", tmp_path / "int4")(ids).logits
    # compressed-tensors multiplies q and scale in fp16 for an fp16 checkpoint: half a unit in the last place each.
    torch.testing.assert_close(logits, expected, rtol=0, atol=float(expected.abs().max()) * 2e-3)
    plain = model(ids).logits
    # 4 bits of random weights change logits by 0.05 to 0.2 of their square; those of another model would by 2.
    assert 0 < (logits - plain).square().mean() / plain.square().mean() < 0.5

    tied = model.config.tie_word_embeddings and not lm_head
    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied
    manifest = read_manifest(tmp_path / "int4", "int4", verify=True)
    assert manifest.settings["group_size"] == group_size and manifest.results == results
    assert set(results["loss"]) == {"layer 0", "layer 1"} | ({"head"} if lm_head else set())
    assert results["bytes_after"] == (tmp_path / "int4/model.safetensors").stat().st_size < results["bytes_before"]
    assert (tmp_path / "int4/tokenizer.json").read_bytes() == (DEMO_TEACHER / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2", dict(method="gptq")),
        ("qwen3", dict(method="gptq", act_order=True, symmetric=False, group_size=32)),
        ("conv", dict(method="gptq", bits=8)),
        ("qwen2", dict(symmetric=False)),
        ("qwen2", dict(bits=8)),
        ("llama3", dict(bits=8, symmetric=False, group_size=64)),
        ("qwen2", dict(head_bits=8)),
        ("llama3", dict(method="rtn", bits=8, head_bits=4)),
        ("qwen3", dict(head_bits=16)),
        ("qwen2", dict(method="rtn", embedding_bits=4)),
        ("qwen2", dict(head_bits=8, embedding_bits=8)),
        ("conv", dict(embedding_bits=4, symmetric=False)),
        ("llama3", dict(method="rtn", embedding_bits=4)),
        ("qwen2", dict(method="gptq", kv_bits=8)),
    ],
)
@torch.no_grad()
def test_every_option_is_what_transformers_loads(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", name, num_hidden_layers=2)
    quantize(tmp_path / "model", tmp_path / "out", perplexity=False, **options, **SMALL)
    ids = torch.randint(0, 2048, (2, 40))
    loaded = load(tmp_path / "out")
    logits, plain = loaded(ids).logits, model(ids).logits
    error = float((logits - plain).square().mean() / plain.square().mean())
    bits = min(options.get("bits", 4), options.get("head_bits", 4) if "bits" not in options else 8)
    assert 0 < error < (0.5 if bits == 4 or options.get("head_bits") == 4 else 2e-3), error
    read = Checkpoint(tmp_path / "out")
    read.check_complete()
    if options.get("kv_bits") != 8:
        expected = reference(tmp_path / "model", tmp_path / "out")(ids).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=float(expected.abs().max()) * 2e-3)
    head_bits = options.get("head_bits", options.get("bits", 4))
    packing = read.packing("lm_head")
    assert (16 if packing is None else packing.bits) == head_bits
    tied = model.config.tie_word_embeddings and 16 > head_bits == options.get("embedding_bits", 16)
    settings = read_manifest(tmp_path / "out", "int4").settings
    assert settings["tied_table"] == tied and settings["head_bits"] == head_bits
    if tied:  # to the bit: fp16 of what the packed head says, in float64
        table = reference(tmp_path / "model", tmp_path / "out").lm_head.weight.detach()
        stored = load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(stored, table.half())
        assert torch.equal(loaded.model.embed_tokens.weight.half(), loaded.lm_head.weight.half())


@pytest.mark.parametrize("name", ["chat", "reasoning"])
def test_sets_that_come_along(name: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", "qwen2", num_hidden_layers=1)
    results = quantize(tmp_path / "model", tmp_path / "out", calibration=name, **SMALL)
    assert math.isfinite(results["perplexity_after"])
    manifest = read_manifest(tmp_path / "out", "int4")
    assert manifest.settings["calibration"] == name and "calibration" in manifest.inputs


@torch.no_grad()
def test_perplexities_are_those_of_transformers(qwen2: Path, tmp_path: Path) -> None:
    chats = [task.chat() for task in distinct("train", 7, 60)]
    write_chats(tmp_path / "chats.jsonl", chats)
    results = quantize(qwen2, tmp_path / "int4", calibration=tmp_path / "chats.jsonl", seed=3, **SMALL)
    text = read_samples(
        ChatTokenizer(qwen2), tmp_path / "chats.jsonl", samples=4, sample_length=128, seed=3, vocab_size=2048
    )
    for key, model in (("before", load(qwen2)), ("after", reference(qwen2, tmp_path / "int4"))):
        total, count = 0.0, 0
        for example in text.held_out:  # one by one: no padding
            ids = torch.tensor([example.ids])
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            trained = torch.tensor(example.trained[1:])
            total, count = total + float(losses[trained].double().sum()), count + int(trained.sum())
        assert results[f"perplexity_{key}"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_held_out_chats_are_not_calibrated_on(qwen2: Path, tmp_path: Path) -> None:
    chats = [task.chat() for task in distinct("train", 1, 40)]
    write_chats(tmp_path / "chats.jsonl", chats * 2)
    tokenizer = ChatTokenizer(qwen2)
    for source in (tmp_path / "chats.jsonl", None):
        text = read_samples(tokenizer, source, samples=64, sample_length=64, seed=0, vocab_size=2048)
        calibration = tokenizer.decode(text.rows.reshape(-1).tolist(), skip_special=False)
        for example in text.held_out:
            question = tokenizer.decode([i for i, t in zip(example.ids, example.trained, strict=True) if not t])
            assert question not in calibration
        assert text.rows.shape[1] == 64 and text.held_out


def test_the_same_seed_gives_the_same_bytes(qwen2: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(qwen2, tmp_path / name, perplexity=False, lm_head=False, **SMALL)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_quantized_checkpoint_is_refused(qwen2: Path, tmp_path: Path) -> None:
    quantize(qwen2, tmp_path / "int4", method="rtn", perplexity=False)
    with pytest.raises(UserError, match="quantized already"):
        quantize(tmp_path / "int4", tmp_path / "again", perplexity=False)


def drop_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def change_tensor(name: str, change: Any) -> Any:
    def edit(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        changed = change(tensors.pop(name)) if name in tensors else change(None)
        save_file(tensors | ({name: changed} if changed is not None else {}), path, metadata={"format": "pt"})

    return edit


def widen(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 1024}))


def set_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor([1]), float("nan"))


def nothing(directory: Path) -> None:
    pass


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize(
    ("edit", "options", "error", "message"),
    [
        (drop_weights, {}, ArtifactError, "no model.safetensors"),
        (change_tensor(UP, set_nan), {}, UserError, "NaN"),
        (change_tensor(NORM, set_nan), {}, UserError, "NaN|not finite"),
        (change_tensor(UP, lambda _: None), {}, ArtifactError, "no tensor " + UP),
        (change_tensor("base.lora_A", lambda _: torch.ones(2)), {}, OrinKitError, "base.lora_A"),
        (widen, {}, ArtifactError, r"gate_proj.weight is \[640, 384\], config.json says \[1024, 384\]"),
        (nothing, {"group_size": 256}, UserError, "384 input features.*--group-size 128"),
        (nothing, {"group_size": 100}, UserError, "use one of 32"),
        (nothing, {"embedding_bits": 5}, UserError, "16, 8 or 4"),
        (nothing, {"bits": 3}, UserError, "weights of 3 bits.*use 4 or 8"),
        (nothing, {"head_bits": 5}, UserError, "head of 5 bits.*use 16, 8 or 4"),
        (nothing, {"head_bits": 4, "lm_head": False}, UserError, "left out.*--no-lm-head"),
        (nothing, {"kv_bits": 4}, UserError, "KV cache of 4 bits.*use 16 or 8"),
        (nothing, {"kv_scales": "head"}, UserError, "8-bit KV cache.*--kv-bits 8"),
        (nothing, {"kv_bits": 8, "kv_scales": "token"}, UserError, "channel, head, tensor"),
        (nothing, {"head_bits": 8, "symmetric": False}, UserError, "a head of 8 bits.*--symmetric"),
        (nothing, {"act_order": True}, UserError, "no act-order.*--method gptq"),
        (nothing, {"method": "magic"}, UserError, "use one of awq, gptq, rtn"),
        (nothing, {"calibration": "none.jsonl", "perplexity": True}, UserError, "no such chat file"),
        (nothing, {"samples": 0, "perplexity": True}, UserError, "samples is 0"),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(
    method: str, edit: Any, options: dict[str, Any], error: type[Exception], message: str, qwen2: Path, tmp_path: Path
) -> None:
    shutil.copytree(qwen2, tmp_path / "model")
    edit(tmp_path / "model")
    with pytest.raises(error, match=message):
        quantize(tmp_path / "model", tmp_path / "int4", **({"method": method, "perplexity": False} | SMALL | options))
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_too_few_chats(qwen2: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl", [task.chat() for task in distinct("train", 1, 5)])
    with pytest.raises(UserError, match=r"gives \d+ tokens to calibrate on, 512 are needed"):
        quantize(qwen2, tmp_path / "int4", calibration=tmp_path / "chats.jsonl", **SMALL)


def test_another_models_tokenizer(qwen2: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", "qwen2", vocab_size=300, num_hidden_layers=1)
    with pytest.raises(UserError, match="the model knows 300"):
        quantize(tmp_path / "model", tmp_path / "int4", **SMALL)


def test_the_model_itself_is_never_the_output(qwen2: Path, tmp_path: Path) -> None:
    quantize(qwen2, tmp_path / "int4", method="rtn", perplexity=False)
    with pytest.raises(UserError, match="is the model itself"):
        quantize(tmp_path / "int4", tmp_path / "int4", method="rtn", overwrite=True)


def test_int4_checkpoints_read_as_their_dequantized_weights(qwen2: Path, tmp_path: Path) -> None:
    quantize(qwen2, tmp_path / "int4", method="rtn", perplexity=False)
    read = Checkpoint(tmp_path / "int4").float32("lm_head.weight")
    expected = reference(qwen2, tmp_path / "int4").lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(read, expected)
