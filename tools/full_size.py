"""Quantize, export and profile a full-size Qwen2.5-1.5B with random weights, and say what each step took.

    python tools/full_size.py --work /tmp/full-size --json docs/measurements/full-size.json

The weights are random, so nothing is said about text; sizes, times and memory are the real model's. Peak memory is each
command's own largest resident set, as the kernel reports it (wait4).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from orin_kit.models.spec import DecoderSpec, spec_from_config
from orin_kit.tokenizer import TOKENIZER_FILES

# https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536,
    "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936, "torch_dtype": "bfloat16",
}  # fmt: skip
TOKENIZER = Path(__file__).parents[1] / "calibration/demo-teacher"


def tensors(spec: DecoderSpec, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The checkpoint's shards: embedding, each layer, last norm."""

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def ones() -> np.ndarray:
        return np.ones(spec.hidden_size, ml_dtypes.bfloat16)

    yield "embedding", {"model.embed_tokens.weight": normal(spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shard = {f"{prefix}.{name}.weight": normal(*shape) for name, shape in spec.linear_shapes().items()}
        for name, size in (("q_proj", spec.q_size), ("k_proj", spec.kv_size), ("v_proj", spec.kv_size)):
            shard[f"{prefix}.self_attn.{name}.bias"] = normal(size)
        shard |= {f"{prefix}.{norm}.weight": ones() for norm in ("input_layernorm", "post_attention_layernorm")}
        yield f"layer-{layer:02}", shard
    yield "norm", {"model.norm.weight": ones()}


def make_checkpoint(directory: Path, config: dict[str, Any] = CONFIG) -> None:
    """A sharded bf16 checkpoint as Qwen ships it, 3.1 GB with the 1.5B's config; weights are tied."""
    directory.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for name, shard in tensors(spec_from_config(config), np.random.default_rng(0)):
        file = f"model-{name}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        if (TOKENIZER / name).is_file():
            shutil.copy(TOKENIZER / name, directory / name)


def run(*args: str) -> dict[str, float]:
    """Run an orin-kit command: seconds and peak resident bytes."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "orin_kit", *args])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):  # 3: a target was missed, which is an answer
        raise SystemExit(f"orin-kit {' '.join(args)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/orin-kit-full-size"), help="needs 6 GB")
    parser.add_argument("--embedding-bits", choices=["16", "8", "4"], default="4")
    parser.add_argument("--threads", default=str(len(os.sched_getaffinity(0))))
    parser.add_argument("--prompt-lengths", default="32,128,512")
    parser.add_argument("--repeats", default="5")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--keep", action="store_true", help="keep the model files")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    model, int4, onnx, report = (args.work / name for name in ("model", "int4", "onnx", "profile"))
    # In a process of its own: a command's peak, as the kernel counts it, begins with what its parent's memory was.
    maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(model,))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("the checkpoint could not be made")
    rtn = ("--method", "rtn", "--no-perplexity", "--embedding-bits", args.embedding_bits)
    profiled = ("--prompt-lengths", args.prompt_lengths, "--repeats", args.repeats, "--threads", args.threads)
    figures: dict[str, Any] = {
        "quantize": run("quantize", str(model), "--out", str(int4), *rtn),
        "export": run("export", str(int4), "--out", str(onnx), "--max-len", "2048"),
        "profile": run("profile", str(onnx), "--out", str(report), *profiled),
    }
    table = Table("command", "seconds", "peak memory, GB", title="Qwen2.5-1.5B, random weights, INT4")
    for name, row in figures.items():
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e9:.2f}")
    Console().print(table)
    figures["report"] = json.loads((report / "report.json").read_text("utf-8"))
    figures["onnx_bytes"] = sum(file.stat().st_size for file in onnx.glob("model.onnx*"))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    if not args.keep:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
