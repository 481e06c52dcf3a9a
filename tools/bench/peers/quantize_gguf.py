"""Quantize a GGUF file as llama.cpp's `llama-quantize` does; it runs in the interpreter that has llama-cpp-python.

    python quantize_gguf.py F16.gguf OUT.gguf --type Q4_0 [--pure]

Without `--pure` the head (here the tied embedding) is made Q6_K, in Q4_K_M some other matrices too; with it every
matrix is of the one type.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import llama_cpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=["Q4_0", "Q4_K_M", "Q8_0"], required=True)
    parser.add_argument("--pure", action="store_true")
    options = parser.parse_args()
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{options.type}")
    parameters.pure = options.pure
    status = llama_cpp.llama_model_quantize(
        str(options.model).encode(), str(options.out).encode(), ctypes.byref(parameters)
    )
    if status:
        raise SystemExit(f"llama_model_quantize ended with {status}")


if __name__ == "__main__":
    main()
