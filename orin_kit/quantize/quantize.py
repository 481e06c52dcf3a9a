"""`orin-kit quantize`: a checkpoint to INT4 or INT8 weights, group-wise, as compressed-tensors' pack-quantized."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orin_kit.errors import UserError
from orin_kit.manifest import check_free, write_artifact
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.spec import HEAD, DecoderSpec, read_config, read_spec
from orin_kit.quantize.calibrate import Samples, chat_file, read_samples
from orin_kit.quantize.compressed import quantization_config
from orin_kit.quantize.kv_layout import STRATEGIES, Granularity, scale_entries
from orin_kit.quantize.options import Options
from orin_kit.quantize.rtn import rtn
from orin_kit.quantize.sections import Quantized, Section, plan, sections
from orin_kit.quantize.tensor_files import TensorFiles
from orin_kit.tokenizer import ChatTokenizer, copy_tokenizer


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "awq",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    lm_head: bool = True,
    head_bits: int | None = None,
    embedding_bits: int = 16,
    kv_bits: int = 16,
    kv_scales: Granularity = "channel",
    calibration: str | Path | None = None,
    samples: int = 128,
    sample_length: int = 256,
    perplexity: bool = True,
    overwrite: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Quantize a model directory into an `int4` artifact.

    Linears become INT4 or INT8, everything else fp16. A tied head that is quantized is stored by itself, beside the
    fp16 embedding, and the copy's config says so. Where the tied embedding is to have as many bits as the head, one
    table serves as both: the manifest's settings say `tied_table`, and the fp16 embedding, which transformers needs, is
    the dequantized head.

    Args:
        model: a plain Hugging Face checkpoint directory.
        out: the artifact to write.
        method: "awq", "gptq", or "rtn" (round to nearest: no calibration, least memory).
        bits: of the linears, 4 or 8.
        group_size: input features that share a scale: 32, 64, 128 or 256.
        symmetric: no zero points, as TensorRT needs it.
        act_order: with gptq, round the columns with the largest inputs first.
        lm_head: quantize the head too.
        head_bits: of the head: 4, 8, or 16 for fp16; by default as the linears, or fp16 without `lm_head`.
        embedding_bits: what the exporter makes of the embedding table: 16, 8 or 4. compressed-tensors checkpoints
            that transformers loads keep it in fp16, so here it is only written down.
        kv_bits: of the KV cache; with 8 its scales are measured on the calibration text and stored.
        kv_scales: what shares a scale of an 8-bit cache: each "channel" of a head, "head" or "tensor". The last two
            are stored as compressed-tensors does, the first as `kv_layout` says.
        calibration: chats (jsonl) to calibrate and measure on, or a set that comes along ("chat", "reasoning"); the
            synthetic tasks when None.
        samples: rows of calibration text.
        sample_length: tokens of each.
        perplexity: measure it on held-out chats, before and after.
        overwrite: replace `out`.
        seed: of the choice of samples.

    Returns:
        `bytes_before`, `bytes_after` (of the weights), `loss` (by section, see `sections.Quantized`), and
        `perplexity_before`, `perplexity_after` when measured.

    Raises:
        UserError: an option or the calibration file is no good, groups do not fit, weights are NaN, the model is
            already quantized, `out` exists.
        ArtifactError: the model directory is not whole.
        UnsupportedModelError: a family or field that orin-kit does not know.
    """
    if not lm_head and head_bits not in (None, 16):
        raise UserError(f"the head is to have {head_bits} bits and to be left out", mend="drop --no-lm-head")
    wanted = head_bits if lm_head else 16
    options = Options(method, bits, group_size, symmetric, wanted, embedding_bits, act_order, kv_bits, kv_scales)
    chats = chat_file(calibration)
    check_free(out, overwrite=overwrite)
    if Path(out).resolve() == Path(model).resolve():
        raise UserError(f"{out} is the model itself", mend="choose another --out")
    checkpoint = _open(model)
    spec = checkpoint.spec
    options.check_model(spec)
    cut = _cut(spec, options)
    entries = plan(cut)
    text = None
    if perplexity or method != "rtn" or options.cache:
        text = read_samples(
            ChatTokenizer(model), chats, samples=samples, sample_length=sample_length, seed=seed,
            vocab_size=spec.vocab_size,
        )  # fmt: skip
    settings = {
        **asdict(options), "lm_head": options.head is not None, "tied_table": options.tied(spec),
        "head_bits": 16 if options.head is None else options.head.bits, "kv_scales": options.cache,
        "calibration": None if calibration is None else str(calibration), "samples": samples,
        "sample_length": sample_length, "perplexity": perplexity, "seed": seed,
    }  # fmt: skip
    inputs = {"model": model} | ({} if chats is None else {"calibration": chats})
    with write_artifact(out, "int4", inputs=inputs, settings=settings, overwrite=overwrite) as artifact:
        loss: dict[str, float] = {}
        with TensorFiles(artifact.directory, entries) as files, _progress() as bar:
            for done in bar.track(_run(checkpoint, cut, options, text), len(cut), description="quantize"):
                for name, tensor in done.tensors.items():
                    files.put(name, tensor)
                if done.loss is not None:
                    loss[done.section] = done.loss
        _write_config(checkpoint, artifact.directory, options)
        copy_tokenizer(checkpoint.directory, artifact.directory)
        artifact.results |= {
            "bytes_before": _weight_bytes(checkpoint.directory),
            "bytes_after": _weight_bytes(artifact.directory),
            "loss": loss,
        }
        if perplexity and text is not None:
            artifact.results |= _measure(checkpoint, artifact.directory, text)
    return artifact.results


def _cut(spec: DecoderSpec, options: Options) -> list[Section]:
    cache = options.cache
    scales = []
    if cache is not None:
        heads, dim = spec.num_key_value_heads, spec.head_dim
        scales = [scale_entries(layer, heads, dim, cache) for layer in range(spec.num_hidden_layers)]
    return sections(spec, options.scheme, options.head, tied=options.tied(spec), cache_scales=scales)


def _open(model: str | Path) -> Checkpoint:
    spec: DecoderSpec = read_spec(model)
    if spec.quantization_config is not None:
        how = spec.quantization_config.get("quant_method", "an unknown method")
        raise UserError(f"{model} is quantized already ({how})", mend="give the fp16 model it was made from")
    checkpoint = Checkpoint(model)
    checkpoint.check_complete()
    return checkpoint


def _run(checkpoint: Checkpoint, cut: Sequence[Section], options: Options, text: Samples | None) -> Iterator[Quantized]:
    if text is None or (options.method == "rtn" and options.cache is None):
        return rtn(checkpoint, cut)
    # torch and transformers, which rtn does without.
    from orin_kit.quantize.awq import Awq
    from orin_kit.quantize.gptq import Gptq
    from orin_kit.quantize.sequential import Method, Nearest, quantize_sequentially

    methods: dict[str, Method[Any]] = {
        "awq": Awq(checkpoint.spec.head_dim), "gptq": Gptq(options.act_order), "rtn": Nearest()
    }  # fmt: skip
    return quantize_sequentially(checkpoint, cut, text.rows, methods[options.method], options.cache)


def _measure(checkpoint: Checkpoint, after: Path, text: Samples) -> dict[str, float]:
    from orin_kit.quantize.perplexity import perplexity  # as above

    with _progress() as bar:
        task = bar.add_task("perplexity", total=2 * checkpoint.spec.num_hidden_layers)
        return {
            f"perplexity_{when}": perplexity(directory, text.held_out, lambda: bar.advance(task))
            for when, directory in (("before", checkpoint.directory), ("after", after))
        }


def _write_config(checkpoint: Checkpoint, directory: Path, options: Options) -> None:
    config, head = read_config(checkpoint.directory), options.head
    # transformers 5 writes dtype, older versions read torch_dtype.
    config["dtype" if "dtype" in config else "torch_dtype"] = "float16"
    if head is not None:
        config["tie_word_embeddings"] = False
        config.pop("tie_embedding", None)  # LFM2's older name for it, which would win
    config["quantization_config"] = quantization_config(
        options.scheme,
        ignored=() if head is not None else (HEAD,),
        others={} if head in (None, options.scheme) else {HEAD: head},
        kv_strategy=None if options.cache is None else STRATEGIES[options.cache],
    )
    if not options.symmetric:
        # For transformers: compressed-tensors 0.20 has no place for packed zero points in a model that stays packed.
        config["quantization_config"]["dequantize"] = True
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _progress() -> Progress:
    """On stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
