"""One engine on one model, timed: greedy answers to fixed random prompts. `../decode.py` starts it, see there.

    python run_decode.py ENGINE MODEL --threads 2 --pass 128,64 --pass 512,0 --max-len 2112 --vocab 4096 --out OUT.json

It runs in the interpreter that has the engine, so it needs nothing but numpy besides. The loop is the same for all: the
cache is emptied (not timed), the prompt goes in and the likeliest next token comes out (prefill), which goes in and
gives the next one, and so on (decode), whatever the model would take for an end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

WARM_UP = (16, 4)  # tokens of the prompt and of the answer that are not counted, first


class Engine(Protocol):
    """A model with an empty cache after `reset`; `prefill` and `decode` give the greedy next token."""

    version: str

    def reset(self) -> None: ...

    def prefill(self, ids: np.ndarray) -> int: ...

    def decode(self, token: int) -> int: ...

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Fp32 `[vocab]` after a prompt; the cache was empty and holds no more than the prompt then."""
        ...


class OrinKit:
    def __init__(self, options: argparse.Namespace) -> None:
        from importlib.metadata import version

        from orin_kit.runtime.backends.onnx import OnnxBackend

        self._backend = OnnxBackend(options.model, max_len=options.max_len, threads=options.threads)
        self.version = f"orin-kit {version('orin-kit')}, {self._backend.name}"

    def reset(self) -> None:
        self._backend.reset()

    def prefill(self, ids: np.ndarray) -> int:
        return int(self.logits(ids).argmax())

    def decode(self, token: int) -> int:
        return int(self._backend.decode(np.array([token]))[0].argmax())

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self._backend.prefill([ids.tolist()])[0]


class Genai:
    """https://onnxruntime.ai/docs/genai/api/python.html: `append_tokens` runs the prompt, the choice comes after."""

    def __init__(self, options: argparse.Namespace) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(options.model))
        threads = {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._og, self._model, self._max_len = og, og.Model(config), options.max_len
        self._generator: Any = None
        self.version = f"onnxruntime-genai {og.__version__}"

    def reset(self) -> None:
        self._generator = None  # the old cache goes first
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._max_len, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)

    def prefill(self, ids: np.ndarray) -> int:
        self._generator.append_tokens(ids.astype(np.int32))
        return self._next()

    def decode(self, token: int) -> int:
        return self._next()  # it feeds the token that it chose itself

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self._generator.append_tokens(ids.astype(np.int32))
        # Before the choice: after it, get_logits runs the model on the chosen token.
        return np.asarray(self._generator.get_logits(), np.float32)[0, -1]


class LlamaCpp:
    """llama.cpp's C interface as llama-bench uses it: its defaults (n_batch 2048, n_ubatch 512, fp16 cache)."""

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp as llama

        self._llama, self._batch = llama, 2048
        llama.llama_backend_init()
        model_parameters = llama.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(str(options.model).encode(), model_parameters)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {options.model}")
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = options.max_len, self._batch, 512
        parameters.n_threads = parameters.n_threads_batch = options.threads
        kinds = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}
        parameters.flash_attn_type = getattr(llama, f"LLAMA_FLASH_ATTN_TYPE_{kinds[options.flash_attention]}")
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.version = f"llama-cpp-python {llama.__version__}"

    def reset(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def prefill(self, ids: np.ndarray) -> int:
        return int(self.logits(ids).argmax())

    def decode(self, token: int) -> int:
        return int(self._run(np.array([token])).argmax())

    def logits(self, ids: np.ndarray) -> np.ndarray:
        pieces = [ids[start : start + self._batch] for start in range(0, len(ids), self._batch)]
        return [self._run(piece) for piece in pieces][-1]

    def _run(self, ids: np.ndarray) -> np.ndarray:
        """The last token's logits: a view that the next step overwrites."""
        tokens = (self._llama.llama_token * len(ids))(*ids.tolist())
        status = self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise SystemExit(f"llama_decode ended with {status}")
        self._llama.llama_synchronize(self._context)
        address = self._llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,))


class Transformers:
    """Eager, SDPA attention, a cache that grows: what `generate` does by default."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        self._torch = torch
        dtype = getattr(torch, options.dtype)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def reset(self) -> None:
        self._cache = None

    def prefill(self, ids: np.ndarray) -> int:
        return int(self._run(ids).argmax())

    def decode(self, token: int) -> int:
        return self.prefill(np.array([token]))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self._run(ids).float())

    def _run(self, ids: np.ndarray) -> Any:
        with self._torch.inference_mode():
            row = self._torch.from_numpy(ids)[None]
            out = self._model(row, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = out.past_key_values
            return out.logits[0, -1]


ENGINES = {"orin-kit": OrinKit, "genai": Genai, "llama.cpp": LlamaCpp, "transformers": Transformers}
IMPORTS = {
    "orin-kit": "orin_kit.runtime.backends.onnx",
    "genai": "onnxruntime_genai",
    "llama.cpp": "llama_cpp",
    "transformers": "transformers.models.qwen2.modeling_qwen2",
}  # what is loaded before the clock of the load starts


def memory() -> dict[str, int]:
    """Resident bytes of this process: all, of its own (anonymous), mapped from files, and the most there ever were.

    proc(5), /proc/pid/smaps_rollup: "Anonymous" counts pages that no file backs.
    """
    rollup, status = (Path(f"/proc/self/{name}").read_text().splitlines() for name in ("smaps_rollup", "status"))
    kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:] + [x for x in status if x[:5] == "VmHWM"]}
    resident, anonymous = kib["Rss"] * 1024, kib["Anonymous"] * 1024
    found = {"resident": resident, "anonymous": anonymous, "file": resident - anonymous}
    return found | {"peak": max(kib["VmHWM"] * 1024, resident)}


def prompt(length: int, vocabulary: int) -> np.ndarray:
    """The random prompt of a length, the same for every engine: int64 `[length]`."""
    return np.random.default_rng(length).integers(0, vocabulary, length)


def timed_answer(engine: Engine, ids: np.ndarray, new_tokens: int) -> dict[str, Any]:
    """Seconds of the prefill and of each decode step, the choice of the token included."""
    clock = time.perf_counter
    engine.reset()
    start = clock()
    token = engine.prefill(ids)
    prefill = clock() - start
    steps = []
    for _ in range(new_tokens):
        start = clock()
        token = engine.decode(token)
        steps.append(clock() - start)
    return {"prompt": len(ids), "prefill": prefill, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--pass", dest="passes", action="append", required=True, help="PROMPT,NEW tokens, in turn")
    parser.add_argument("--max-len", type=int, required=True, help="tokens that the cache must hold")
    parser.add_argument("--vocab", type=int, required=True, help="prompts are drawn from the ids below")
    parser.add_argument("--dtype", default="bfloat16", help="of transformers")
    parser.add_argument("--flash-attention", choices=["auto", "on", "off"], default="auto", help="of llama.cpp")
    parser.add_argument("--out", type=Path, required=True, help="JSON; the first prompt's logits go beside it, .npy")
    options = parser.parse_args()
    __import__(IMPORTS[options.engine])
    before = memory()
    start = time.perf_counter()
    engine: Engine = ENGINES[options.engine](options)
    found: dict[str, Any] = {"version": engine.version, "load": time.perf_counter() - start}
    found["memory"] = {"before": before, "loaded": memory()}
    timed_answer(engine, prompt(WARM_UP[0], options.vocab), WARM_UP[1])
    passes = [tuple(map(int, one.split(","))) for one in options.passes]
    engine.reset()
    np.save(options.out.with_suffix(".npy"), engine.logits(prompt(passes[0][0], options.vocab)))
    found["passes"] = [timed_answer(engine, prompt(length, options.vocab), new) for length, new in passes]
    found["memory"]["end"] = memory()
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
