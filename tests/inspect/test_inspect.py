"""What inspect says of models is what their files and transformers say: every family, plain, INT4 and ONNX."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from families import FAMILIES, save_model
from orin_kit.errors import ArtifactError, UserError
from orin_kit.export.export import export
from orin_kit.inspect import tensors as tensors_module
from orin_kit.inspect.inspect import inspect
from orin_kit.inspect.inspection import Inspection
from orin_kit.manifest import read_manifest, write_artifact
from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.models.spec import read_spec
from orin_kit.quantize.quantize import quantize
from orin_kit.quantize.sections import plan, sections
from orin_kit.quantize.tensor_files import TensorFiles
from orin_kit.runtime.backends.onnx import OnnxBackend

CONFIGS = Path(__file__).parents[1] / "data/configs"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    home = tmp_path_factory.mktemp(request.param)
    dtype = [torch.float32, torch.float16, torch.bfloat16][int(torch.randint(3, ()))]
    model = save_model(home / "hf32", request.param)
    model.to(dtype).save_pretrained(home / "hf", max_shard_size="1MB")
    quantize(home / "hf32", home / "int4", method="rtn", perplexity=False, embedding_bits=8)
    export(home / "hf32", home / "onnx", max_len=256, progress=False)
    export(home / "int4", home / "int4-onnx", progress=False)
    return model, home


def tensor_bytes(directory: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for file in directory.glob("*.safetensors"):
        header = file.read_bytes()
        entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        entries.pop("__metadata__", None)
        sizes |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    return sizes


def initializer_bytes(directory: Path) -> dict[str, int]:
    model = onnx.load(directory / "model.onnx")
    return {t.name: onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer}


def rows(found: Inspection) -> dict[str, Any]:
    assert found.model is not None
    return {row.kind: row for row in found.model.kinds}


def test_plain_checkpoints(family: tuple[PreTrainedModel, Path]) -> None:
    model, home = family
    found = inspect(home / "hf")
    assert found.model and found.kind == "checkpoint" and not found.mismatches
    assert found.model.parameters == found.model.stored_parameters == model.num_parameters()
    sizes = tensor_bytes(home / "hf")
    assert found.model.weights_bytes == sum(sizes.values())
    assert found.disk_bytes == sum(file.stat().st_size for file in (home / "hf").iterdir())
    kinds = rows(found)
    block = "conv." if read_spec(home / "hf").layout.mixer == "conv" else "self_attn."
    expected = {
        "embedding": lambda n: "embed_tokens" in n,
        "head": lambda n: n.startswith("lm_head"),
        "mixer": lambda n: block in n and "norm" not in n and not n.endswith("bias"),
        "mlp": lambda n: (".mlp." in n or ".feed_forward." in n) and not n.endswith("bias"),
        "norms_and_biases": lambda n: "norm" in n or n.endswith("bias"),
    }
    for kind, belongs in expected.items():
        wanted = sum(size for name, size in sizes.items() if belongs(name))
        assert (kinds[kind].bytes if kind in kinds else 0) == wanted, kind
    row = sizes["model.embed_tokens.weight"] // 2048
    rest = found.model.weights_bytes - sizes["model.embed_tokens.weight"]
    table = sizes["model.embed_tokens.weight"] if found.model.tied else 0  # read whole as the head
    assert found.model.token_bytes == rest + row + table


def test_int4_checkpoints(family: tuple[PreTrainedModel, Path]) -> None:
    model, home = family
    found = inspect(home / "int4")
    assert found.model and found.kind == "int4" and not found.mismatches and found.made
    table = 2048 * 384 if read_spec(home / "hf").tie_word_embeddings else 0  # the head is stored by itself now
    assert found.model.stored_parameters == model.num_parameters() + table
    sizes = tensor_bytes(home / "int4")
    assert found.model.weights_bytes == sum(sizes.values())
    for field, end in (("packed_bytes", "weight_packed"), ("scale_bytes", "weight_scale")):
        stored = sum(size for name, size in sizes.items() if name.endswith(end))
        assert stored and sum(getattr(row, field) for row in found.model.kinds) == stored
    assert found.model.group_size == 128
    assert rows(found)["head"].dtypes == ["INT4"]


@pytest.mark.parametrize("name", ["onnx", "int4-onnx"])
def test_onnx_artifacts(family: tuple[PreTrainedModel, Path], name: str) -> None:
    _, home = family
    found = inspect(home / name)
    assert found.model and found.kind == "onnx" and not found.mismatches and found.graph
    assert found.model.parameters == found.model.stored_parameters == read_spec(home / name).num_parameters
    sizes = initializer_bytes(home / name)
    assert found.model.weights_bytes == sum(sizes.values()) == sum(i.bytes for i in found.graph.initializers)
    assert sum(i.count for i in found.graph.initializers) == len(sizes)
    kinds, int4 = rows(found), name == "int4-onnx"
    assert kinds["mlp"].dtypes == (["INT4"] if int4 else ["F32"])
    assert kinds["embedding"].dtypes == (["INT8"] if int4 else ["F32"])
    assert found.graph.opsets == {"ai.onnx": 21, "com.microsoft": 1} and found.graph.dialect == "ort"
    max_len = 256 if name == "onnx" else 512
    assert found.model.max_len == max_len
    backend = OnnxBackend(home / name, max_len=max_len, threads=1)  # what it really reserves
    held = found.predictions[0].memory_bytes - found.predictions[0].weights_bytes
    assert held == backend.memory()["kv_cache"]


def test_a_table_stored_twice(tmp_path: Path) -> None:
    """A tied head in FP32 beside an INT4 embedding: the exporter keeps both."""
    save_model(tmp_path / "hf", "qwen2")
    quantize(tmp_path / "hf", tmp_path / "int4", method="rtn", perplexity=False, lm_head=False)
    export(tmp_path / "int4", tmp_path / "onnx", embedding_bits=4, progress=False)
    found = inspect(tmp_path / "onnx")
    assert not found.mismatches
    kinds = rows(found)
    assert kinds["head"].token_bytes == kinds["head"].bytes == 2048 * 384 * 4
    assert kinds["embedding"].packed_bytes == 2048 * 384 // 2
    assert kinds["embedding"].token_bytes == 384 // 2 + 384 // 32 * 4
    again = inspect(tmp_path / "int4")
    assert not again.mismatches and again.model and "head" not in rows(again)
    assert rows(again)["embedding"].token_bytes == 2048 * 384 * 2 + 384 * 2


def test_a_reference_graph_of_int4(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen3")
    quantize(tmp_path / "hf", tmp_path / "int4", method="rtn", perplexity=False)
    export(tmp_path / "int4", tmp_path / "onnx", dialect="reference", progress=False)
    found = inspect(tmp_path / "onnx")
    assert found.graph and found.model and not found.mismatches
    assert found.graph.dialect == "reference" and set(found.graph.ops) == {"ai.onnx"}
    assert sum(row.packed_bytes for row in found.model.kinds) * 2 == sum(
        row.parameters for row in found.model.kinds if row.kind in ("head", "mixer", "mlp")
    )


def test_what_the_plan_says_is_what_quantize_writes() -> None:
    """`planned` without reading weights, against the sections that quantize plans its files by."""
    for directory in CONFIGS.iterdir():
        spec = read_spec(directory)
        mine = tensors_module.planned(spec, int4=True)
        assert mine is not None
        theirs = {
            name: int(np.prod(shape)) * np.dtype(dtype).itemsize
            for name, (dtype, shape) in plan(sections(spec, WeightScheme(), WeightScheme())).items()
            if not name.endswith("weight_shape")
        }
        assert {t.name: t.bytes for t in mine} == theirs


def test_a_whole_7b_checkpoint_is_looked_at_without_reading_it(tmp_path: Path) -> None:
    """15 GB of holes: a reader of weights would need minutes and the memory."""
    config = json.loads((CONFIGS / "Qwen2.5-7B-Instruct/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    shapes = spec.tensor_shapes()
    files = TensorFiles(tmp_path, {name: (np.float16, shape) for name, shape in shapes.items()})
    assert list(tmp_path.glob("model-0000?-of-00004.safetensors"))
    found = inspect(tmp_path)
    del files
    assert found.model and not found.mismatches
    assert found.model.stored_parameters == 7_615_616_512
    assert found.model.weights_bytes == 2 * 7_615_616_512
    for file in tmp_path.iterdir():
        file.unlink()


def test_mismatches_are_said(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "llama-biased-linear")
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 384), np.float32)
    tensors["model.norm.weight"] = np.zeros(380, np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    said = "\n".join(inspect(tmp_path / "hf").mismatches)
    assert f"mlp: config.json says {9 * 384 * 640:,} parameters, files hold {8 * 384 * 640:,}" in said
    assert "1 tensors are missing, e.g. model.layers.1.mlp.up_proj.weight" in said
    assert "1 tensors do not belong to the family, e.g. model.layers.0.self_attn.q_proj.lora_A.weight" in said
    assert "model.norm.weight is [380], config.json says [384]" in said
    assert "norms and biases: " in said


def test_a_graph_of_another_config_is_said(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen2")
    export(tmp_path / "hf", tmp_path / "onnx", progress=False)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "onnx/config.json").write_text(json.dumps(config | {"num_key_value_heads": 3, "vocab_size": 1024}))
    (tmp_path / "onnx/orin_kit.json").unlink()
    found = inspect(tmp_path / "onnx")
    assert found.kind == "onnx" and found.made is None
    said = "\n".join(found.mismatches)
    assert "embedding: config.json says 393,216 parameters, files hold 786,432" in said
    assert "KV cache bytes a token: config.json says 4,608, the graph's inputs 3,072" in said


def test_verify_compares_files_and_inputs(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen2")
    export(tmp_path / "hf", tmp_path / "onnx", progress=False)
    assert (made := inspect(tmp_path / "onnx").made) and made.inputs["model"].now == "not checked"
    assert (made := inspect(tmp_path / "onnx", verify=True).made) and made.verified
    assert made.inputs["model"].now == "same"
    assert made.inputs["model"].sha256 == read_manifest(tmp_path / "onnx").inputs["model"]["sha256"]
    config = tmp_path / "hf/config.json"
    config.write_text(config.read_text() + " ")
    assert (made := inspect(tmp_path / "onnx", verify=True).made) and made.inputs["model"].now == "changed"
    shutil.rmtree(tmp_path / "hf")
    assert (made := inspect(tmp_path / "onnx", verify=True).made) and made.inputs["model"].now == "not here"
    data = tmp_path / "onnx/model.onnx.data"
    damaged = bytearray(data.read_bytes())
    damaged[77] ^= 1
    data.write_bytes(damaged)
    inspect(tmp_path / "onnx")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        inspect(tmp_path / "onnx", verify=True)


@pytest.mark.parametrize("kind", ["logits", "traces", "profile", "demo", "engine"])
def test_other_artifacts_by_their_manifest(tmp_path: Path, kind: str) -> None:
    with write_artifact(tmp_path / "a", kind, inputs={}, settings={"k": 8}) as artifact:
        (artifact.directory / "data").write_bytes(b"12345")
        artifact.results["rows"] = 3
    found = inspect(tmp_path / "a")
    assert found.kind == kind and found.model is None and not found.predictions
    assert found.made and found.made.settings == {"k": 8} and found.made.files == 1
    assert found.contents == {"rows": 3}


def test_context_and_prompt_within_the_model(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "qwen2")
    first = inspect(tmp_path / "hf").predictions[0]
    assert (first.context, first.prompt_length) == (512, 128)  # the context of these models is 512
    assert inspect(tmp_path / "hf", context=7, prompt_length=9).predictions[0].context == 7
    with pytest.raises(UserError, match="--context 513 is not between 1 and 512"):
        inspect(tmp_path / "hf", context=513)
    with pytest.raises(UserError, match="--prompt-length 600"):
        inspect(tmp_path / "hf", prompt_length=600)
