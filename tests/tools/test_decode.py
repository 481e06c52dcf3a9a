"""tools/bench/decode.py: its arithmetic against numbers worked out by hand, and a whole run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bandwidth
import numpy as np
import onnx
import psutil
import pytest
from decode import arguments, passes
from decode_models import SHAPES
from decode_report import (
    best_bandwidth,
    figures,
    floor_seconds,
    gguf_bytes_a_token,
    markdown,
    onnx_bytes_a_token,
    onnx_cache_bytes_a_token,
)
from full_size import make_checkpoint
from onnx import TensorProto, helper

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS / "bench" / "peers"))
import run_decode  # noqa: E402  # its folder is on the path from here on


def onnx_model(path: Path, *, tied: bool) -> Path:
    """An embedding `[10, 8]`, a linear `[8, 8]` in 4 bits and a head `[8, 10]`, with a cache of 2 heads of 4, fp16."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [10, 8], np.zeros(80, np.float32))
    head = helper.make_tensor("head", TensorProto.FLOAT, [8, 10], np.zeros(80, np.float32))
    linear = helper.make_tensor("linear", TensorProto.UINT4, [8, 8], np.zeros(64, np.uint8))
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["hidden"]),
        helper.make_node("Linear", ["hidden", "linear"], ["out"], domain="test"),
        helper.make_node("Head", ["out", "table" if tied else "head"], ["logits"], domain="test"),
    ]
    cache = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT16, ["batch", 2, "length", 4])
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1]), cache]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table, linear] + ([] if tied else [head]))
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_linears_and_head_whole_and_a_row_of_the_embedding(tmp_path: Path, tied: bool) -> None:
    model = onnx_model(tmp_path / "model.onnx", tied=tied)
    assert onnx_bytes_a_token(model) == 8 * 8 // 2 + 8 * 10 * 4  # the table once, as the head, or the head alone
    assert onnx_cache_bytes_a_token(model, head_dim=5) == 2 * 4 * 2


def row(**changes: Any) -> dict[str, Any]:
    one = {"prompt": 100, "prefill": 0.5, "steps": [0.010, 0.012, 0.011, 0.500]}
    other = {"prompt": 100, "prefill": 0.4, "steps": [0.010, 0.012, 0.011, 0.013]}
    end = {"resident": 3e9, "anonymous": 2e9, "file": 1e9, "peak": 4e9}
    run = {"passes": [one, other, {"prompt": 50, "prefill": 0.1, "steps": []}], "load": 1.5, "memory": {"end": end}}
    run["version"] = "engine 1"
    sizes = {"case": "engine", "file_bytes": 1e9, "bytes_a_token": 9e8, "cache_bytes_a_token": 1e4}
    return sizes | {"runs": [run]} | changes


def test_figures_are_medians_of_a_process_and_shares_of_the_floor() -> None:
    found = figures(row(), bandwidth=100e9)
    assert found["prefill 100"] == [pytest.approx(100 / 0.45)] and found["prefill 50"] == [pytest.approx(500)]
    assert found["decode 100"] == [pytest.approx(1 / 0.0115)]  # one slow step of eight moves nothing
    assert "decode 50" not in found
    assert found["share 100"] == [pytest.approx((9e8 + 102 * 1e4) / 100e9 / 0.0115)]
    assert floor_seconds(row(), 0, 9e8) == 1


def test_tables_give_the_spread_over_processes() -> None:
    first, second = row()["runs"][0], row()["runs"][0]
    second["passes"] = [{"prompt": 100, "prefill": 0.2, "steps": [0.02]}]
    section = {"bandwidth": [{"huge pages": [50e9, 90e9]}, {"huge pages": [100e9, 80e9]}], "bandwidth_by": "numpy"}
    text = markdown({"shapes": {"0.5b": section | {"rows": [row(runs=[first, second], correlation=0.98765)]}}})
    assert best_bandwidth(section["bandwidth"]) == {"huge pages": 100e9}
    assert "numpy: 100.0 GB/s on huge pages (95.0)" in text
    speed = next(line for line in text.splitlines() if line.startswith("| engine |") and "prefill" not in line)
    assert "| 361 (222-500) |" in speed and "| 68.5 (50.0-87.0), 62 % |" in speed and "| 0.988 |" in speed
    memory = [line for line in text.splitlines() if line.startswith("| engine | 3.00 | 2.00 | 1.00 | 4.00 |")]
    assert len(memory) == 1


def test_contexts_that_are_no_prompt_length_run_once() -> None:
    options = arguments().parse_args(["--prompts", "8", "32", "--contexts", "8", "64", "--new-tokens", "5"])
    assert passes(options) == [(8, 5), (32, 0), (8, 5), (32, 0), (64, 5)]


def test_memory_is_what_psutil_says() -> None:
    block = np.ones(30_000_000, np.int8)
    found, process = run_decode.memory(), psutil.Process()
    assert found["resident"] == pytest.approx(process.memory_info().rss, rel=0.05)
    assert found["file"] == pytest.approx(process.memory_info().shared, rel=0.1)
    assert found["anonymous"] > block.nbytes and found["peak"] >= found["resident"]


def test_bandwidth_by_the_compiler_and_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SIZE", 1 << 26)
    by_numpy = bandwidth.numpy_reads(2, tries=3)
    compiled = bandwidth.compiled_reads(2, tries=3) or {}
    assert all(len(tries) == 3 and min(tries) > 1e8 for tries in [by_numpy, *compiled.values()])


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the gguf package")
def test_the_gguf_holds_the_checkpoint(tmp_path: Path) -> None:
    import gguf
    from write_gguf import write

    from orin_kit.models.weights import WeightSource

    make_checkpoint(tmp_path / "model", SHAPES["tiny"])
    write(tmp_path / "model", tmp_path / "model.gguf")
    reader, source = gguf.GGUFReader(tmp_path / "model.gguf"), WeightSource(tmp_path / "model")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(source.names)
    names = {
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    names |= {"blk.0.attn_k.bias": "model.layers.0.self_attn.k_proj.bias", "output_norm.weight": "model.norm.weight"}
    for theirs, ours in names.items():
        assert np.array_equal(tensors[theirs].data, source.get(ours).astype(tensors[theirs].data.dtype))
    assert gguf_bytes_a_token(tmp_path / "model.gguf") == sum(tensor.data.nbytes for tensor in tensors.values())


def test_a_whole_run(tmp_path: Path) -> None:
    command = [sys.executable, TOOLS / "bench" / "decode.py", "--shapes", "tiny", "--rounds", "2", "--threads", "1"]
    command += ["--prompts", "32", "--contexts", "32", "48", "--new-tokens", "4", "--work", tmp_path / "work"]
    command += ["--cases", "orin-kit INT4", "llama.cpp Q4_0", "transformers fp32", "--llama-python", "/nowhere/python"]
    command += ["--json", tmp_path / "decode.json", "--markdown", tmp_path / "decode.md"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "llama.cpp is left out; to have it: CMAKE_ARGS" in done.stderr
    section = json.loads((tmp_path / "decode.json").read_text())["shapes"]["tiny"]
    ours, theirs = section["rows"]
    assert [ours["case"], len(ours["runs"]), len(theirs["runs"])] == ["orin-kit INT4", 2, 1]
    assert theirs["correlation"] == pytest.approx(1) and 0.9 < ours["correlation"] < 0.9999
    assert len(section["bandwidth"]) == 3
    assert theirs["bytes_a_token"] == 2 * theirs["file_bytes"]  # bf16 on disk, fp32 in memory
    assert "orin-kit INT4" in (tmp_path / "decode.md").read_text()
