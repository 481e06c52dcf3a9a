"""The models of `decode.py`: one random checkpoint a shape, and what every engine makes of it.

Each is made in a folder of its own, once; `made.json` beside it says how long that took and how much memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import environment, run

sys.path.insert(0, str(Path(__file__).parents[1]))
from full_size import CONFIG, make_checkpoint  # it lies one folder up

SHAPES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json
    "0.5b": CONFIG | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                      "num_attention_heads": 14},
    "1.5b": CONFIG,
    "tiny": CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "vocab_size": 4096},  # to try the tool with
}  # fmt: skip
PEERS = Path(__file__).parent / "peers"
GGUF = {"q4_0": (), "q4_0-pure": ("--pure",), "q4_k_m": ()}


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: what it says.
        engine: of `peers/run_decode.py`.
        model: the folder of its model under the shape's.
        options: further ones of `peers/run_decode.py`.
    """

    name: str
    engine: str
    model: str
    options: tuple[str, ...] = field(default=())


CASES = (
    Case("orin-kit INT4", "orin-kit", "orin-kit"),
    Case("llama.cpp Q4_0", "llama.cpp", "q4_0"),
    Case("llama.cpp Q4_0, head too", "llama.cpp", "q4_0-pure"),
    Case("llama.cpp Q4_K_M", "llama.cpp", "q4_k_m"),
    Case("onnxruntime-genai", "genai", "genai"),
    Case("onnxruntime-genai, tuned", "genai", "genai-tuned"),
    Case("transformers bf16", "transformers", "checkpoint", ("--dtype", "bfloat16")),
    Case("transformers fp32", "transformers", "checkpoint", ("--dtype", "float32")),
)
INSTALL = {
    "genai": "pip install 'orin-kit[host,bench]'",
    "llama.cpp": "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python==0.3.36, and --llama-python if elsewhere",
    "transformers": "pip install 'orin-kit[host]'",
    "orin-kit": "pip install 'orin-kit[host]'",
}
# Symmetric, accuracy level 4 (int8 activations) in both. The first is the builder's own defaults; the second what its
# --help offers to make this model faster on a CPU: larger blocks, and logits of the prompt's last token alone.
GENAI = {
    "genai": ("accuracy_level=4",),
    "genai-tuned": ("accuracy_level=4", "block_size=128", "prune_lm_head=true"),
}


def genai_builder(python: Path, checkpoint: Path, out: Path, cache: Path, extra: tuple[str, ...]) -> list[str | Path]:
    """https://onnxruntime.ai/docs/genai/howto/build-model.html"""
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out, "-p", "int4", "-e", "cpu"]
    return [*command, "-c", cache, "--extra_options", *extra]


def orin_kit_commands(checkpoint: Path, out: Path, options: argparse.Namespace) -> list[list[str | Path]]:
    """Quantize, then export into `out`; the INT4 checkpoint in between goes beside it."""
    ours: list[str | Path] = [sys.executable, "-m", "orin_kit"]
    middle = out.with_name(out.name + "-int4")
    quantize = [*ours, "quantize", checkpoint, "--out", middle, "--overwrite", *options.quantize_options.split()]
    export = [*ours, "export", middle, "--out", out, "--overwrite", *options.export_options.split()]
    return [quantize, export]


class Models:
    """Where the models of a shape lie, made when they are asked for.

    Args:
        work: the folder of all shapes.
        shape: a key of `SHAPES`.
        options: the tool's: interpreters, threads, options of quantize and export, what to make anew.
    """

    def __init__(self, work: Path, shape: str, options: argparse.Namespace) -> None:
        self.folder, self.config, self.options = work / shape, SHAPES[shape], options
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Path:
        """The model's folder, or file if it is a GGUF."""
        folder = self.folder / name
        if name in self.options.remake:
            self.options.remake.remove(name)
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "made.json").is_file():
            maker = self._maker(name)
            partial = folder.with_name(f".{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            print(f"making {folder}", file=sys.stderr, flush=True)
            made = maker(partial)
            (partial / "made.json").write_text(json.dumps(made))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        return folder / "model.gguf" if name in GGUF else folder / "model" if name != "checkpoint" else folder

    def made(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "made.json").read_text("utf-8")))

    def _maker(self, name: str) -> Callable[[Path], dict[str, Any]]:
        if name == "checkpoint":
            return self._make_checkpoint
        if name == "orin-kit":
            return self._make_orin_kit
        return (lambda out: self._make_gguf(name, out)) if name in GGUF else lambda out: self._make_genai(name, out)

    def _make_checkpoint(self, out: Path) -> dict[str, Any]:
        # In a process of its own: peaks of the commands that follow begin with what this one holds.
        maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(out, self.config))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the checkpoint could not be made")
        return {}

    def _make_orin_kit(self, out: Path) -> dict[str, Any]:
        checkpoint = self.get("checkpoint")
        out.mkdir()
        commands = orin_kit_commands(checkpoint, out / "model", self.options)
        made = [self._run(command, out / f"log-{n}.txt") for n, command in enumerate(commands)]
        shutil.rmtree(out / "model-int4")
        return {"quantize": made[0], "export": made[1]}

    def _make_genai(self, name: str, out: Path) -> dict[str, Any]:
        checkpoint = self.get("checkpoint")
        out.mkdir()
        python = Path(self.options.genai_python)
        command = genai_builder(python, checkpoint, out / "model", out / "cache", GENAI[name])
        made: dict[str, Any] = self._run(command, out / "log.txt")
        shutil.rmtree(out / "cache", ignore_errors=True)
        return made | {"options": GENAI[name]}

    def _make_gguf(self, name: str, out: Path) -> dict[str, Any]:
        checkpoint, whole = self.get("checkpoint"), self.folder / "f16.gguf"
        out.mkdir()
        if not whole.is_file():
            partial = whole.with_suffix(".partial")
            self._run([sys.executable, PEERS / "write_gguf.py", checkpoint, partial], out / "log-write.txt")
            partial.rename(whole)
        kind = name.removesuffix("-pure").upper()
        quantize = [self.options.llama_python, PEERS / "quantize_gguf.py", whole, out / "model.gguf", "--type", kind]
        return self._run([*quantize, *GGUF[name]], out / "log.txt")

    def _run(self, command: list[str | Path], log: Path) -> dict[str, float]:
        return run(command, environment(self.options.threads), log)

    def forget_intermediate(self) -> None:
        """The fp16 GGUF is needed only to make the others."""
        (self.folder / "f16.gguf").unlink(missing_ok=True)
