"""`orin-kit quantize`: a checkpoint to INT4 weights, group-wise, in compressed-tensors' pack-quantized format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orin_kit.errors import UserError
from orin_kit.manifest import check_free, write_artifact
from orin_kit.models.spec import HEAD, DecoderSpec, read_config, read_spec
from orin_kit.quantize.calibrate import Samples, read_samples
from orin_kit.quantize.checkpoint import Checkpoint, Quantized, Section, plan, sections
from orin_kit.quantize.compressed import Int4Config
from orin_kit.quantize.rtn import rtn
from orin_kit.quantize.tensor_files import TensorFiles
from orin_kit.tokenizer import ChatTokenizer, copy_tokenizer

METHODS = ("awq", "rtn")
EMBEDDING_BITS = (16, 8, 4)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "awq",
    group_size: int = 128,
    lm_head: bool = True,
    embedding_bits: int = 16,
    calibration: str | Path | None = None,
    samples: int = 128,
    sample_length: int = 256,
    perplexity: bool = True,
    overwrite: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Quantize a model directory into an `int4` artifact.

    Linears become symmetric INT4, everything else fp16. A tied head that is quantized is stored by itself, beside the
    fp16 embedding, and the copy's config says so.

    Args:
        model: a plain Hugging Face checkpoint directory.
        out: the artifact to write.
        method: "awq", or "rtn" (round to nearest: no calibration, least memory).
        group_size: input features that share a scale: 32, 64, 128 or 256.
        lm_head: quantize the head too.
        embedding_bits: what the exporter makes of the embedding table: 16, 8 or 4. compressed-tensors checkpoints
            that transformers loads keep it in fp16, so here it is only written down.
        calibration: chats (jsonl) to calibrate and measure on; the synthetic reasoning tasks when None.
        samples: rows of calibration text.
        sample_length: tokens of each.
        perplexity: measure it on held-out chats, before and after.
        overwrite: replace `out`.
        seed: of the choice of samples.

    Returns:
        `bytes_before`, `bytes_after` (of the weights), `loss` (by section, see `checkpoint.Quantized`), and
        `perplexity_before`, `perplexity_after` when measured.

    Raises:
        UserError: an option or the calibration file is no good, groups do not fit, weights are NaN, the model is
            already quantized, `out` exists.
        ArtifactError: the model directory is not whole.
        UnsupportedModelError: a family or field that orin-kit does not know.
    """
    settings = {
        "method": method, "group_size": group_size, "lm_head": lm_head, "embedding_bits": embedding_bits,
        "calibration": None if calibration is None else str(calibration), "samples": samples,
        "sample_length": sample_length, "perplexity": perplexity, "seed": seed,
    }  # fmt: skip
    _check_options(method, embedding_bits)
    check_free(out, overwrite=overwrite)
    if Path(out).resolve() == Path(model).resolve():
        raise UserError(f"{out} is the model itself", mend="choose another --out")
    checkpoint = _open(model)
    cut = sections(checkpoint.spec, lm_head=lm_head)
    entries = plan(cut, group_size)
    text = None
    if perplexity or method == "awq":
        text = read_samples(
            ChatTokenizer(model), calibration, samples=samples, sample_length=sample_length, seed=seed,
            vocab_size=checkpoint.spec.vocab_size,
        )  # fmt: skip
    inputs = {"model": model} | ({} if calibration is None else {"calibration": calibration})
    with write_artifact(out, "int4", inputs=inputs, settings=settings, overwrite=overwrite) as artifact:
        loss: dict[str, float] = {}
        with TensorFiles(artifact.directory, entries) as files, _progress() as bar:
            for done in bar.track(_run(method, checkpoint, cut, group_size, text), len(cut), description="quantize"):
                for name, tensor in done.tensors.items():
                    files.put(name, tensor)
                if done.loss is not None:
                    loss[done.section] = done.loss
        _write_config(checkpoint, artifact.directory, Int4Config(group_size, () if lm_head else (HEAD,)))
        copy_tokenizer(checkpoint.directory, artifact.directory)
        artifact.results |= {
            "bytes_before": _weight_bytes(checkpoint.directory),
            "bytes_after": _weight_bytes(artifact.directory),
            "loss": loss,
        }
        if perplexity and text is not None:
            artifact.results |= _measure(checkpoint, artifact.directory, text)
    return artifact.results


def _check_options(method: str, embedding_bits: int) -> None:
    if method not in METHODS:
        raise UserError(f"method {method!r} is not known", mend=f"use one of {', '.join(METHODS)}")
    if embedding_bits not in EMBEDDING_BITS:
        raise UserError(f"embedding bits {embedding_bits} are not known", mend="use 16, 8 or 4")


def _open(model: str | Path) -> Checkpoint:
    spec: DecoderSpec = read_spec(model)
    if spec.quantization_config is not None:
        how = spec.quantization_config.get("quant_method", "an unknown method")
        raise UserError(f"{model} is quantized already ({how})", mend="give the fp16 model it was made from")
    checkpoint = Checkpoint(model)
    checkpoint.check_complete()
    return checkpoint


def _run(
    method: str, checkpoint: Checkpoint, cut: Sequence[Section], group_size: int, text: Samples | None
) -> Iterator[Quantized]:
    if method == "rtn" or text is None:
        return rtn(checkpoint, cut, group_size)
    from orin_kit.quantize.awq import awq  # torch and transformers, which rtn does without

    return awq(checkpoint, cut, group_size, text.rows)


def _measure(checkpoint: Checkpoint, after: Path, text: Samples) -> dict[str, float]:
    from orin_kit.quantize.perplexity import perplexity  # as above

    with _progress() as bar:
        task = bar.add_task("perplexity", total=2 * checkpoint.spec.num_hidden_layers)
        return {
            f"perplexity_{when}": perplexity(directory, text.held_out, lambda: bar.advance(task))
            for when, directory in (("before", checkpoint.directory), ("after", after))
        }


def _write_config(checkpoint: Checkpoint, directory: Path, scheme: Int4Config) -> None:
    config = read_config(checkpoint.directory)
    # transformers 5 writes dtype, older versions read torch_dtype.
    config["dtype" if "dtype" in config else "torch_dtype"] = "float16"
    if HEAD not in scheme.ignored:
        config["tie_word_embeddings"] = False
        config.pop("tie_embedding", None)  # LFM2's older name for it, which would win
    config["quantization_config"] = scheme.to_config()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _progress() -> Progress:
    """On stderr, and nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
