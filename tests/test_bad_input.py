"""Bad input: one line that says what, where and how to mend it; exit code 2 (the user's fault); nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from families import save_model
from orin_kit import cli
from orin_kit.errors import EXIT_USER
from orin_kit.export.export import export
from orin_kit.manifest import write_artifact
from orin_kit.quantize.quantize import quantize


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model, its INT4 checkpoint and its ONNX artifact."""
    home = tmp_path_factory.mktemp("good")
    save_model(home / "model", "qwen2")
    quantize(home / "model", home / "int4", method="rtn", perplexity=False)
    export(home / "model", home / "onnx", progress=False)
    return home


@pytest.fixture
def good(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage, as the working directory."""
    shutil.copytree(made, tmp_path / "w")
    before = Path.cwd()
    os.chdir(tmp_path / "w")
    yield tmp_path / "w"
    os.chdir(before)


def orin_kit(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["orin-kit", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capfd.readouterr().err


def edit_config(**changes: object) -> Callable[[], None]:
    def edit() -> None:
        path = Path("model/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def cut(path: str) -> Callable[[], None]:
    def damage() -> None:
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) * 2 // 3])

    return damage


def write(path: str, text: str) -> Callable[[], None]:
    return lambda: (Path(path).write_text(text), None)[1]


def nan_weights() -> None:
    tensors = load_file("model/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})


def odd_width() -> None:
    save_model(Path("odd"), "qwen2", intermediate_size=608)


def lose_a_tensor() -> None:
    tensors = load_file("model/model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})


def lose_a_shard() -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))


def other_tokenizer() -> None:
    shutil.copytree("model", "student")
    tokenizer = json.loads(Path("student/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[600:602]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    Path("student/tokenizer.json").write_text(json.dumps(tokenizer))
    recipe("student")()


def recipe(student: str = "model", extra: str = "") -> Callable[[], None]:
    text = f"teacher: model\nstudent: {student}\ndata:\n  tasks:\n    count: 64\ntest_items: 4\n"
    stages = "stages:\n  features: null\n  attention: null\n  task:\n    steps: 3\n"
    return write("recipe.yaml", text + stages + extra)


def unknown_operator() -> None:
    shutil.rmtree("onnx")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nobody")
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(
        helper.make_graph([node], "g", [value], [output]), opset_imports=[helper.make_opsetid("nobody", 1)]
    )
    with write_artifact("onnx", "onnx", inputs={}, settings={"max_len": 64}) as artifact:
        onnx.save(model, artifact.directory / "model.onnx")
        (artifact.directory / "model.onnx.data").write_bytes(b"")
        shutil.copy("model/tokenizer.json", artifact.directory / "tokenizer.json")


EXPORT, QUANTIZE = ("export", "model", "--out", "out"), ("quantize", "model", "--out", "out")
RTN = (*QUANTIZE, "--method", "rtn", "--no-perplexity")
DISTILL = ("distill", "recipe.yaml", "--out", "out")
PROFILE = ("profile", "onnx", "--out", "out", "--prompt-lengths", "8", "--repeats", "1")
CHAT = ("chat", "onnx", "--prompt", "hello")
NOTHING: Callable[[], None] = lambda: None  # noqa: E731
BAD: dict[str, tuple[Callable[[], None], tuple[str, ...], str]] = {
    # what is wrong: (how it comes about, the command, what the message says)
    "missing model": (NOTHING, ("export", "nowhere", "--out", "out"), "no such directory: nowhere"),
    "missing config": (lambda: Path("model/config.json").unlink(), EXPORT, "no config.json in model"),
    "broken config": (write("model/config.json", '{"model_type": '), EXPORT, "not JSON"),
    "wrong family": (edit_config(model_type="gpt2"), EXPORT, "'gpt2' is not supported: use one of qwen2"),
    "unknown field": (edit_config(final_logit_softcapping=30.0), EXPORT, "final_logit_softcapping"),
    "rope scaling": (edit_config(rope_parameters={"rope_type": "longrope"}), EXPORT, "'longrope' is not supported"),
    "cut weights, export": (cut("model/model.safetensors"), EXPORT, "cut short"),
    "cut weights, quantize": (cut("model/model.safetensors"), RTN, "cut short"),
    "cut weights, distill": (lambda: (cut("model/model.safetensors")(), recipe()())[1], DISTILL, "cut short"),
    "missing shard": (lose_a_shard, EXPORT, "lacks its shard model-00002"),
    "missing tensor": (lose_a_tensor, EXPORT, "no tensor model.layers.2.mlp.down_proj.weight"),
    "another model's config": (edit_config(vocab_size=4096), EXPORT, "config.json says [4096, 384]"),
    "NaN weights": (nan_weights, RTN, "model.layers.1.mlp.up_proj"),
    "groups do not fit": (odd_width, ("quantize", "odd", *RTN[2:]), "use --group-size 32"),
    "quantized twice": (NOTHING, ("quantize", "int4", "--out", "out"), "already"),
    "INT8 without quantize": (NOTHING, (*EXPORT, "--precision", "int8"), "run orin-kit quantize model"),
    "INT4 groups do not fit": (odd_width, ("export", "odd", *EXPORT[2:], "--precision", "int4"), "use --group-size 32"),
    "group size of what is not rounded": (NOTHING, (*EXPORT, "--group-size", "64"), "leave out --group-size"),
    "context too long": (NOTHING, (*EXPORT, "--max-len", "9999"), "longer than the model's context of 512"),
    "out exists": (NOTHING, ("export", "model", "--out", "int4"), "exists: choose another --out or add --overwrite"),
    "out is not ours": (NOTHING, ("export", "model", "--out", "model", "--overwrite"), "not an orin-kit artifact"),
    "out under a file": (write("file", ""), ("export", "model", "--out", "file/out"), "cannot be written to"),
    "not an ONNX artifact": (NOTHING, ("chat", "model", "--prompt", "hi"), "no orin_kit.json"),
    "another kind of artifact": (NOTHING, ("chat", "int4", "--prompt", "hi"), "is a int4 artifact, not onnx"),
    "cut ONNX data": (cut("onnx/model.onnx.data"), CHAT, "its manifest says"),
    "lost ONNX file": (lambda: Path("onnx/model.onnx").unlink(), PROFILE, "lacks its file model.onnx"),
    "broken manifest": (write("onnx/orin_kit.json", "{}"), CHAT, "orin_kit.json cannot be read"),
    "unknown operator": (unknown_operator, CHAT, "onnxruntime cannot open"),
    "no such provider": (NOTHING, (*CHAT, "--provider", "cuda"), "no CUDAExecutionProvider"),
    "prompt too long": (NOTHING, ("chat", "onnx", "--max-len", "16", "--prompt", "word " * 99), "--max-len"),
    "bad sampling": (NOTHING, (*CHAT, "--temperature", "-1"), "temperature"),
    "bad targets": (write("t.yaml", "ttft_p95_ms: soon"), (*PROFILE, "--targets", "t.yaml"), "ttft_p95_ms"),
    "profile beyond context": (NOTHING, ("profile", "onnx", "--out", "out", "--prompt-lengths", "9999"), "9999"),
    "missing recipe": (NOTHING, ("distill", "no.yaml", "--out", "out"), "no.yaml"),
    "broken recipe": (write("recipe.yaml", "teacher: [model"), DISTILL, "recipe.yaml"),
    "recipe with an unknown field": (recipe(extra="batchsize: 3\n"), DISTILL, "batchsize"),
    "recipe with a wrong value": (recipe(extra="batch_size: many\n"), DISTILL, "batch_size"),
    "tokenizers differ": (other_tokenizer, DISTILL, "tokenizer"),
    "NaN loss": (lambda: (nan_weights(), recipe()())[1], DISTILL, "the loss (nan), its gradient (nan)"),
    "missing calibration": (NOTHING, (*QUANTIZE, "--calibration", "no.jsonl"), "no.jsonl"),
    "broken chats": (write("c.jsonl", '{"messages": 3}\n'), (*QUANTIZE, "--calibration", "c.jsonl"), "c.jsonl line 1"),
    "wrong command": (NOTHING, ("exprot",), "exprot"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_exit_code_2(
    case: str, good: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, command, said = BAD[case]
    damage()
    code, err = orin_kit(capfd, monkeypatch, *command)
    last = [line for line in err.splitlines() if line.strip()][-1]
    assert code == EXIT_USER, err
    assert said in last
    assert "Traceback" not in err
    assert not Path("out").exists()
    assert not list(Path().glob(".out.partial*"))


def test_disk_full(good: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    disk = good / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=False).returncode
    ):
        pytest.skip("a small file system can only be mounted by root")
    try:
        for command in (("export", "model"), ("quantize", "model", "--method", "rtn", "--no-perplexity")):
            code, err = orin_kit(capfd, monkeypatch, *command, "--out", "disk/out")
            assert (code, "out is full: make room" in err) == (EXIT_USER, True), err
            assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_real_process_has_no_traceback_without_debug(good: Path) -> None:
    command = [sys.executable, "-m", "orin_kit", "export", "nowhere", "--out", "out"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == EXIT_USER
    assert plain.stderr.count("\n") == 1
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert "Traceback" in debug.stderr
