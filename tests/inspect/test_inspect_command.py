"""`orin-kit inspect` from the command line: tables, JSON, bad input, and what it never imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from families import save_model
from orin_kit import cli
from orin_kit.errors import EXIT_USER
from orin_kit.export.export import export
from orin_kit.inspect.inspection import Inspection
from orin_kit.quantize.quantize import quantize

Run = Callable[..., tuple[int, str, str]]
# What the device install does not have; onnxruntime it has, but inspect needs none.
HOST_ONLY = (
    "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors", "peft", "accelerate",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("made")
    save_model(home / "model", "qwen2")
    quantize(home / "model", home / "int4", method="rtn", perplexity=False)
    export(home / "int4", home / "onnx", progress=False)
    save_model(home / "conv", "conv")
    export(home / "conv", home / "conv-onnx", progress=False)
    save_model(home / "sharded", "qwen2")
    tensors = load_file(home / "sharded/model.safetensors")
    names = list(tensors)
    for shard, part in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
        save_file({name: tensors[name] for name in part}, home / "sharded" / shard)
    where = dict.fromkeys(names[:5], "a.safetensors") | dict.fromkeys(names[5:], "b.safetensors")
    (home / "sharded/model.safetensors").unlink()
    (home / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return home


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage, as the working directory."""
    shutil.copytree(made, tmp_path / "w")
    before = Path.cwd()
    os.chdir(tmp_path / "w")
    yield tmp_path / "w"
    os.chdir(before)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def command(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["orin-kit", "inspect", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return command


@pytest.mark.parametrize("name", ["model", "int4", "onnx", "conv", "conv-onnx", "sharded"])
def test_tables_within_100_columns(here: Path, run: Run, name: str) -> None:
    code, out, err = run(name)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert "PREDICTED, NOT MEASURED: Jetson AGX Orin 64GB" in out
    assert "MISMATCH" not in out
    assert ("State: " if "conv" in name else "KV cache: ") in out
    assert ("com.microsoft: " in out) == ("external data" in out) == ("onnx" in name)


@pytest.mark.parametrize("name", ["model", "int4", "onnx", "conv-onnx"])
def test_json_is_one_object_of_the_schema(here: Path, run: Run, name: str) -> None:
    code, out, err = run(name, "--json", "--context", "99", "--prompt-length", "33")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["schema"] == "orin-kit/inspect/1"
    again = Inspection.model_validate(data, strict=True)
    assert json.loads(again.model_dump_json(by_alias=True)) == data
    assert data.keys() == Inspection.model_json_schema()["properties"].keys()
    assert {(p["context"], p["prompt_length"], p["measured"]) for p in data["predictions"]} == {(99, 33, False)}
    assert (data["graph"] is not None) == ("onnx" in name) and (data["made"] is None) == (name == "model")


def edit_config(path: str, **changes: object) -> Callable[[], None]:
    def edit() -> None:
        file = Path(path)
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def cut(path: str, *forget: str) -> Callable[[], None]:
    def damage() -> None:
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) * 2 // 3])
        for name in forget:
            Path(name).unlink()

    return damage


def remove(*paths: str) -> Callable[[], None]:
    return lambda: [Path(path).unlink() for path in paths] and None


BAD: dict[str, tuple[Callable[[], object], tuple[str, ...], str]] = {
    # what is wrong: (how it comes about, the arguments, what the message says)
    "nowhere": (lambda: None, ("nowhere",), "no such directory: nowhere"),
    "nothing of ours": (lambda: None, (".",), "nothing that orin-kit reads or writes: give one of those in it: conv"),
    "empty": (lambda: Path("empty").mkdir(), ("empty",), "give a model or artifact directory"),
    "a file": (lambda: Path("file").write_text(""), ("file",), "is a file"),
    "unknown family": (edit_config("model/config.json", model_type="gpt2"), ("model",), "'gpt2' is not supported"),
    "unknown quantization": (edit_config("model/config.json", quantization_config={"quant_method": "hqq"}), ("model",),
                             "quantization_config: quant_method is 'hqq'"),
    "cut weights": (cut("model/model.safetensors"), ("model",), "cut short"),
    "cut artifact": (cut("int4/model.safetensors"), ("int4",), "bytes, its manifest says"),
    "lost shard": (remove("sharded/b.safetensors"), ("sharded",), "lacks its shard b.safetensors: copy all"),
    "only .bin": (lambda: Path("model/model.safetensors").rename("model/model.bin"), ("model",), "convert .bin"),
    "cut graph": (cut("onnx/model.onnx", "onnx/orin_kit.json"), ("onnx",), "model.onnx is cut short or no ONNX model"),
    "cut data": (cut("onnx/model.onnx.data", "onnx/orin_kit.json"), ("onnx",), "model.onnx.data is cut short"),
    "lost data": (remove("onnx/model.onnx.data", "onnx/orin_kit.json"), ("onnx",), "lacks model.onnx.data"),
    "lost graph": (remove("onnx/model.onnx"), ("onnx",), "lacks its file model.onnx"),
    "lost config": (remove("onnx/config.json", "onnx/orin_kit.json"), ("onnx",), "no config.json in onnx"),
    "no manifest": (lambda: None, ("model", "--verify"), "no orin_kit.json to verify it by: leave out --verify"),
    "long context": (lambda: None, ("onnx", "--context", "9999"), "not between 1 and 512"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_exit_code_2(here: Path, run: Run, case: str) -> None:
    damage, arguments, said = BAD[case]
    damage()
    code, out, err = run(*arguments)
    last = [line for line in err.splitlines() if line.strip()][-1]
    assert (code, out) == (EXIT_USER, ""), err
    assert said in last and "Traceback" not in err


def test_names_cannot_move_the_cursor(here: Path, run: Run) -> None:
    edit_config("onnx/orin_kit.json", made_by="\x1b[2Jmine\x9b")()
    code, out, _ = run("onnx")
    assert code == 0 and "mine" in out and not {"\x1b", "\x9b"} & set(out)


def test_a_demo_run_and_its_summary(here: Path, run: Run) -> None:
    rows = [{"model": "teacher", "accuracy": 0.9283333}]
    Path("demo").mkdir()
    Path("demo/summary.json").write_text(json.dumps({"made_by": "orin-kit 0", "fast": True, "rows": rows}))
    code, out, _ = run("demo")
    assert code == 0 and "a run of orin-kit demo" in out and "model teacher, accuracy 0.9283" in out


def isolated(directory: Path, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Inspect in a process of its own that cannot import `blocked`."""
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.argv = ['orin-kit', 'inspect', {str(directory)!r}, '--json']\n"
        "from orin_kit.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted(name for name, m in sys.modules.items() if m and '.' not in name), file=sys.stderr)\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["onnx", "conv-onnx", "model", "int4"])
def test_in_the_device_install(made: Path, name: str) -> None:
    done = isolated(made / name, HOST_ONLY)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["parameters"] and (found["graph"] is not None) == ("onnx" in name)


@pytest.mark.parametrize("name", ["model", "int4"])
def test_checkpoints_import_nothing_heavy(made: Path, name: str) -> None:
    done = isolated(made / name, ())
    assert done.returncode == 0
    imported = set(done.stderr.split())
    assert "numpy" in imported and not imported & {"torch", "transformers", "onnx", "onnxruntime", "matplotlib"}
