"""LoRA adapters as inputs of the graph, against peft and transformers on random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from families import save_model
from orin_kit.cli import cli
from orin_kit.errors import ArtifactError, UnsupportedModelError, UserError
from orin_kit.export.export import export
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.quantize.rounded import RoundedCheckpoint
from orin_kit.runtime.generator import Generator
from orin_kit.runtime.lora import load_adapter
from orin_kit.runtime.runtime import Runtime, open_runtime
from orin_kit.runtime.sampler import Sampling

MIXED: dict[str, Any] = dict(
    r=4,
    lora_alpha=6,
    target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    rank_pattern={"v_proj": 3, "layers.1.mlp.up_proj": 7},
    alpha_pattern={"layers.2.*.q_proj": 2.5},
)


def random_adapter(model: PreTrainedModel, directory: Path, seed: int = 0, **config: Any) -> torch.nn.Module:
    """Save a random adapter; returns peft's model, on a copy of the weights."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    adapted = get_peft_model(copy, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(directory)
    return adapted


def logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def some_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng().integers(0, 2048, shape)


def opened(directory: Path, **options: Any) -> Runtime:
    return open_runtime(directory, max_len=96, threads=1, **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    home = tmp_path_factory.mktemp("lora")
    model = save_model(home / "hf", "qwen2")
    export(home / "hf", home / "plain", progress=False)
    export(home / "hf", home / "onnx", lora_targets=["all"], progress=False)
    return model, home


@pytest.mark.parametrize(
    "config",
    [
        MIXED,
        dict(r=5, lora_alpha=9, target_modules=["k_proj"], use_rslora=True),
        dict(r=2, target_modules=["gate_proj", "k_proj"], layers_to_transform=[1]),
    ],
)
def test_an_adapter_computes_what_peft_does(
    home: tuple[PreTrainedModel, Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    model, directory = home
    adapted = random_adapter(model, tmp_path, **config)
    runtime = opened(directory / "onnx", adapter=tmp_path)
    ids = some_ids(1, 40)
    expected = logits(adapted, ids)
    assert np.abs(expected - logits(model, ids)).max() > 0.1
    assert np.abs(runtime.backend.score(ids) - expected).max() <= 1e-3
    worst = np.abs(runtime.backend.prefill([ids[0, :37].tolist()])[0] - expected[0, 36]).max()
    for at in range(37, 40):
        worst = max(worst, np.abs(runtime.backend.decode(ids[:, at])[0] - expected[0, at]).max())
    assert worst <= 1e-3


@pytest.mark.parametrize("family", ["qwen3", "conv"])
def test_other_families(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "hf", family)
    export(tmp_path / "hf", tmp_path / "onnx", lora_targets=["all"], progress=False)
    adapted = random_adapter(model, tmp_path / "adapter", r=3, target_modules="all-linear")
    ids = some_ids(2, 30)
    runtime = opened(tmp_path / "onnx", adapter=tmp_path / "adapter", batch_size=2)
    assert np.abs(runtime.backend.score(ids) - logits(adapted, ids)).max() <= 1e-3


def test_without_an_adapter_it_is_the_plain_export(home: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, directory = home
    random_adapter(model, tmp_path, **MIXED)
    ids, runtime = some_ids(1, 30), opened(directory / "onnx")
    plain = opened(directory / "plain").backend.score(ids)
    np.testing.assert_array_equal(runtime.backend.score(ids), plain)
    runtime.set_adapter(tmp_path)
    assert np.abs(runtime.backend.score(ids) - plain).max() > 0.1
    runtime.set_adapter(None)
    np.testing.assert_array_equal(runtime.backend.score(ids), plain)


def test_int4_weights_with_an_adapter(tmp_path: Path) -> None:
    """Within what int8 activations (accuracy level 4) cost, of peft on the dequantized weights."""
    model = save_model(tmp_path / "hf", "qwen2")
    options = dict(precision="int4", embedding_bits=16, lora_targets=["all"], progress=False)
    export(tmp_path / "hf", tmp_path / "onnx", **options)
    rounded = RoundedCheckpoint(tmp_path / "hf", 128)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.from_numpy(rounded.packed(name).dense()))
    model.config.tie_word_embeddings = False
    adapted = random_adapter(model, tmp_path / "adapter", **MIXED)
    ids = some_ids(1, 40)
    expected = logits(adapted, ids)
    error = opened(tmp_path / "onnx", adapter=tmp_path / "adapter").backend.score(ids) - expected
    assert float(np.sqrt(np.mean(error**2)) / expected.std()) < 0.08


def test_switching_between_requests_forgets_the_other_adapters_tokens(
    home: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, directory = home
    adapted = {
        name: random_adapter(model, tmp_path / name, seed, r=4, target_modules=["q_proj", "v_proj"])
        for seed, name in enumerate(("one", "other"))
    }
    runtime = opened(directory / "onnx")
    generator, prompt = Generator(runtime.backend, ()), some_ids(20)
    for name in ("one", "other", "one"):
        runtime.set_adapter(tmp_path / name)
        expected = (
            adapted[name]
            .generate(input_ids=torch.from_numpy(prompt)[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[
                0, 20:
            ]
            .tolist()
        )
        assert list(generator.stream(prompt.tolist(), Sampling(), max_new_tokens=12)) == expected
        assert generator.stats is not None and generator.stats.reused_tokens == 0


def test_the_plain_graph_is_as_it_was_and_targets_choose_linears(
    home: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, directory = home
    plain = onnx.load(directory / "plain/model.onnx", load_external_data=False).graph
    assert not any("lora" in value.name for value in plain.input)
    export(directory / "hf", tmp_path / "onnx", lora_targets=["q_proj", "down_proj"], progress=False)
    graph = onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False).graph
    found = {value.name for value in graph.input if value.name.startswith("lora_A.model.layers.1.")}
    assert found == {"lora_A.model.layers.1.self_attn.qkv_proj", "lora_A.model.layers.1.mlp.down_proj"}
    random_adapter(model, tmp_path / "adapter", r=2, target_modules=["up_proj"])
    with pytest.raises(UserError, match="exported without adapters for it.*--lora-targets"):
        opened(tmp_path / "onnx", adapter=tmp_path / "adapter")
    with pytest.raises(UserError, match="no linear is called qproj"):
        export(directory / "hf", tmp_path / "none", lora_targets=["qproj"], progress=False)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(use_dora=True), "use_dora = True"),
        (dict(bias="all"), "bias = 'all'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(init_lora_weights="olora"), "init_lora_weights = 'olora' changes the base model"),
    ],
)
def test_more_than_lora_is_refused(
    home: tuple[PreTrainedModel, Path], tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    model, directory = home
    random_adapter(model, tmp_path, r=2, target_modules=["q_proj"], **config)
    with pytest.raises(UnsupportedModelError, match=said):
        opened(directory / "onnx", adapter=tmp_path)


def test_an_adapter_of_another_model_is_refused(home: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    spec = Checkpoint(home[1] / "hf").spec
    wider = save_model(tmp_path / "wider", "qwen2", hidden_size=512, num_hidden_layers=4)
    random_adapter(wider, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    with pytest.raises(ArtifactError, match="layers.3.self_attn.q_proj, which the model does not have"):
        load_adapter(tmp_path / "adapter", spec)
    random_adapter(wider, tmp_path / "narrow", r=2, target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(ArtifactError, match=r"has lora_A \[2, 512\].*the model wants \[2, 384\]"):
        load_adapter(tmp_path / "narrow", spec)
    with pytest.raises(ArtifactError, match="no adapter_config.json"):
        load_adapter(tmp_path, spec)


def test_a_broken_adapter_is_refused(home: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, directory = home
    spec = Checkpoint(directory / "hf").spec
    random_adapter(model, tmp_path, r=2, target_modules=["q_proj"])
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, weights)
    with pytest.raises(ArtifactError, match="layers.1.self_attn.q_proj lacks lora_A or lora_B"):
        load_adapter(tmp_path, spec)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LOHA"}))
    with pytest.raises(UnsupportedModelError, match="peft_type is 'LOHA'"):
        load_adapter(tmp_path, spec)


def test_chat_with_an_adapter(home: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, directory = home
    random_adapter(model, tmp_path / "adapter", r=8, target_modules="all-linear")
    ask = ["chat", str(directory / "onnx"), "--prompt", "What is 2 + 3?", "--max-new-tokens", "20", "--max-len", "200"]
    plain, adapted = (CliRunner().invoke(cli, [*ask, *more]) for more in ([], ["--adapter", str(tmp_path / "adapter")]))
    assert plain.exit_code == adapted.exit_code == 0
    assert plain.output != adapted.output
    missing = CliRunner().invoke(cli, [*ask, "--adapter", str(tmp_path)])
    assert isinstance(missing.exception, ArtifactError) and "no adapter_config.json" in str(missing.exception)
