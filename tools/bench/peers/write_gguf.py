"""A Qwen2 checkpoint as a GGUF file in fp16, without a tokenizer: what llama.cpp's `convert_hf_to_gguf.py` would write.

    python write_gguf.py CHECKPOINT OUT.gguf

That script is not in any package; the `gguf` package, which it uses, is. As there, matrices are fp16, vectors fp32
(https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py, Qwen2Model), and tied heads are left out. The
tokenizer is "none" with a vocabulary's size, so only ids go in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from orin_kit.models.weights import WeightSource


def write(checkpoint: Path, out: Path) -> None:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text("utf-8"))
    layers = config["num_hidden_layers"]
    # Tensors wait in a file: the writer needs all of them named before the first is written.
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2], use_temp_file=True)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    source = WeightSource(checkpoint)
    for name in source.names:
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise SystemExit(f"{name} has no name in a GGUF of Qwen2")
        tensor = source.get(name)
        writer.add_tensor(mapped, tensor.astype(np.float32 if tensor.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write(options.checkpoint, options.out)


if __name__ == "__main__":
    main()
