"""The command line: one thin command a verb. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import errno
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from orin_kit.errors import EXIT_INTERNAL, EXIT_TARGET_MISSED, EXIT_USER, OrinKitError

DIRECTORY = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
ISSUES = "add --debug for the traceback and report it"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="orin-kit", prog_name="orin-kit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Distil, quantize, export and profile small language models for the Jetson AGX Orin.

    \b
    From a teacher to a deployment, each arrow one command and one directory:
      orin-kit distill RECIPE --out student
      orin-kit quantize student --out student-int4
      orin-kit export student-int4 --out student-onnx
      orin-kit profile student-onnx --out profile
      orin-kit chat student-onnx
    All of it at once, on models that come along:
      orin-kit demo
    """
    context.obj = debug


def example(*lines: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Append examples to a command's help, one a line."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        body = "\n".join(f"  {line}" for line in lines)
        command.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n\b\nExamples:\n{body}\n"
        return command

    return add


out_option = click.option("--out", "-o", type=DIRECTORY, required=True, help="The directory to write.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace OUT when it exists.")
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
provider_option = click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where onnxruntime runs."
)


@cli.command()
@click.argument("recipe", type=FILE)
@click.option("--out", "-o", type=DIRECTORY, help="The directory to write.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the recipe.")
@click.option("--continue-from", type=DIRECTORY, help="An earlier result that learns on, and should not forget.")
@click.option("--plan", is_flag=True, help="Say what it takes (parameters, memory, GPUs), and train nothing.")
@click.option("--compare", is_flag=True, help="Also train a student without a teacher, over several seeds.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Seeds of --compare.")
@overwrite_option
@example(
    "orin-kit distill calibration/recipes/demo.yaml --out student",
    "orin-kit distill calibration/recipes/qwen2.5-7b-to-1.5b.yaml --plan",
    "orin-kit distill recipe.yaml -o student --set stages.features.steps=200 --set seed=1",
    "orin-kit distill legal.yaml -o student-2 --continue-from student",
    "orin-kit distill recipe.yaml -o compared --compare --seeds 3",
    "accelerate launch --num_processes 8 -m orin_kit distill recipe.yaml -o student",
)
def distill(
    recipe: Path, out: Path | None, overrides: tuple[str, ...], continue_from: Path | None, plan: bool, compare: bool,
    seeds: int, overwrite: bool,
) -> None:  # fmt: skip
    """Distil a teacher into a student as RECIPE says: features, attention maps, then the task.

    Killed, it goes on from its last checkpoint when started again.
    """
    from orin_kit.distill import Recipe
    from orin_kit.distill import compare as run_compare
    from orin_kit.distill import distill as run

    extra = [f"continue_from={json.dumps(str(continue_from))}"] if continue_from else []
    loaded = Recipe.load(recipe, overrides=[*overrides, *extra])
    if plan:
        _print_plan(loaded)
        return
    if out is None:
        raise click.UsageError("Missing option '--out' / '-o'.")
    if compare:
        run_compare(loaded, out, seeds=seeds, overwrite=overwrite)
    else:
        run(loaded, out, overwrite=overwrite)


def _print_plan(recipe: Any) -> None:
    from rich.console import Console

    from orin_kit.distill.plan import plan, plan_table

    Console().print(plan_table(plan(recipe)))


@cli.command()
@click.argument("recipe", type=FILE)
@out_option
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the recipe.")
@click.option("--k", type=click.IntRange(1), default=64, show_default=True, help="Likeliest tokens kept a position.")
@overwrite_option
@example(
    "orin-kit cache recipe.yaml --out teacher-logits",
    "orin-kit distill recipe.yaml -o student --set teacher_logits=teacher-logits \\",
    "    --set stages.features=null --set stages.attention=null",
)
def cache(recipe: Path, out: Path, overrides: tuple[str, ...], k: int, overwrite: bool) -> None:
    """Write the teacher's likeliest tokens for RECIPE's training rows, so that it need not run beside the student.

    Killed, it goes on after the last whole shard when started again.
    """
    from orin_kit.distill import Recipe
    from orin_kit.distill.cache import cache as run

    run(Recipe.load(recipe, overrides=list(overrides)), out, k=k, overwrite=overwrite)


@cli.command()
@click.argument("teacher", type=DIRECTORY)
@out_option
@click.option("--questions", type=FILE, help="Questions (.jsonl), with or without their answers.")
@click.option("--tasks", type=click.IntRange(1), help="Synthetic problems to ask instead.")
@click.option("--kinds", default="", help="Of the problems, separated by commas.  [default: all]")
@click.option("--system", help="A system message for asking; the traces go without it.")
@click.option("--samples", type=click.IntRange(1), default=4, show_default=True, help="Answers to each question.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="Of the sampling.")
@click.option("--top-p", type=float, default=0.95, show_default=True, help="Keep the likeliest tokens up to this sum.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of one answer.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Answers at once.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For the same traces again.")
@click.option("--keep", default="best", show_default=True, help="Traces of a question: best, all, or a number.")
@click.option("--check-answers/--no-check-answers", default=True, show_default=True,
              help="Reject wrong answers, where the right one is known.")  # fmt: skip
@click.option("--require-thought/--no-require-thought", default=True, show_default=True,
              help="Reject answers without <think>...</think>.")  # fmt: skip
@click.option("--min-tokens", type=click.IntRange(1), default=2, show_default=True, help="The shortest trace.")
@click.option("--max-tokens", type=click.IntRange(1), help="The longest trace.  [default: any that ends]")
@click.option("--max-repetition", type=float, default=0.2, show_default=True,
              help="The greatest share of 8-word phrases, or lines, said before; 1: off.")  # fmt: skip
@click.option("--near-duplicate", type=float, default=0.9, show_default=True,
              help="Answers to one question that are more alike than this count once; 1: off.")  # fmt: skip
@threads_option
@provider_option
@overwrite_option
@example(
    "orin-kit traces teacher --tasks 1000 --out traces",
    "orin-kit traces teacher-onnx --questions questions.jsonl -o traces --samples 8 --keep 2",
)
def traces(teacher: Path, out: Path, kinds: str, **options: Any) -> None:
    """Let TEACHER, a checkpoint or an ONNX artifact, reason about questions, and keep the answers worth learning.

    OUT/traces.jsonl holds chats for a recipe's data.chats, OUT/rejected.jsonl the rest, each with the reason.
    Killed, it goes on from its last batch when started again.
    """
    from dataclasses import fields

    from orin_kit.traces.traces import Asking
    from orin_kit.traces.traces import traces as run
    from orin_kit.traces.verifiers import Rules

    asking = Asking(**{field.name: options.pop(field.name) for field in fields(Asking)})
    rules = Rules(**{field.name: options.pop(field.name) for field in fields(Rules)})
    names = [name.strip() for name in kinds.split(",") if name.strip()]
    results = run(teacher, out, kinds=names, asking=asking, rules=rules, **options)
    click.echo(f"{results['passed']} of {results['answers']} answers passed ({results['acceptance_rate']:.1%}); "
               f"{results['traces']} traces of {results['questions_with_traces']} questions, "
               f"{results['mean_tokens']:.0f} tokens on average")  # fmt: skip
    for reason, count in results["rejected"].items():
        click.echo(f"  {reason}: {count}")
    click.echo(f"wrote {out}")


@cli.command()
@click.argument("model", type=DIRECTORY)
@out_option
@click.option("--method", type=click.Choice(["awq", "gptq", "rtn"]), default="awq", show_default=True,
              help="awq and gptq look at calibration text; rtn just rounds, in little memory.")  # fmt: skip
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Of the linears' weights.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="128", show_default=True,
              help="Input features that share a scale.")  # fmt: skip
@click.option("--symmetric/--asymmetric", default=True, show_default=True,
              help="Without zero points or with; TensorRT takes none.")  # fmt: skip
@click.option("--act-order", is_flag=True, help="gptq: round the columns with the largest inputs first.")
@click.option("--lm-head/--no-lm-head", default=True, show_default=True, help="Quantize the output projection too.")
@click.option("--head-bits", type=click.Choice(["4", "8", "16"]),
              help="Of the output projection.  [default: as --bits]")  # fmt: skip
@click.option("--embedding-bits", type=click.Choice(["16", "8", "4"]), default="16", show_default=True,
              help="Of the embedding table once exported; a tied table of the head's bits is stored once.")  # fmt: skip
@click.option("--kv-bits", type=click.Choice(["16", "8"]), default="16", show_default=True,
              help="Of the KV cache; 8 measures its scales on calibration text.")  # fmt: skip
@click.option("--kv-scales", type=click.Choice(["channel", "head", "tensor"]), default="channel", show_default=True,
              help="What shares a scale of an 8-bit cache; compressed-tensors knows head and tensor.")  # fmt: skip
@click.option("--calibration", metavar="SET|FILE", default="tasks", show_default=True,
              help="tasks (the demo family's synthetic ones), chat, reasoning, or your chats (.jsonl).")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Calibration rows.")
@click.option("--sample-length", type=click.IntRange(1), default=256, show_default=True, help="Tokens of a row.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of calibration text.")
@click.option("--perplexity/--no-perplexity", default=True, show_default=True, help="Measure before and after.")
@overwrite_option
@example(
    "orin-kit quantize student --out student-int4",
    "orin-kit quantize Qwen2.5-1.5B-Instruct -o qwen-int4 --calibration chat --embedding-bits 4",
    "orin-kit quantize Qwen3-1.7B -o qwen-int4 --calibration reasoning --head-bits 8 --kv-bits 8",
    "orin-kit quantize student -o student-gptq --method gptq --act-order --group-size 64",
    "orin-kit quantize student -o student-int8 --bits 8 --calibration chats.jsonl",
    "orin-kit quantize big-model -o big-int4 --method rtn --no-perplexity --embedding-bits 4",
)
def quantize(
    model: Path, out: Path, bits: str, group_size: str, head_bits: str | None, embedding_bits: str, kv_bits: str,
    calibration: str, **options: Any,
) -> None:  # fmt: skip
    """Quantize the linears of MODEL to INT4 or INT8, group-wise (AWQ).

    One decoder layer is in memory at a time, and the calibration rows' hidden states: a 1.5B model takes about 3 GB.
    """
    from orin_kit.quantize.quantize import quantize as run

    results = run(
        model, out, bits=int(bits), group_size=int(group_size), head_bits=int(head_bits) if head_bits else None,
        embedding_bits=int(embedding_bits), kv_bits=int(kv_bits),
        calibration=None if calibration == "tasks" else calibration, **options,
    )  # fmt: skip
    if results.get("perplexity_before"):
        click.echo(f"perplexity {results['perplexity_before']:.4f} -> {results['perplexity_after']:.4f}")
    click.echo(f"wrote {out}")


@cli.command()
@click.argument("model", type=DIRECTORY)
@out_option
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int4", "int8"]),
              help="Of the weights.  [default: as they are quantized, else fp32]")  # fmt: skip
@click.option("--activations", type=click.Choice(["fp32", "fp16", "bf16"]),
              help="Also of the KV cache.  [default: fp32 with quantized weights, else as the weights]")  # fmt: skip
@click.option("--dialect", type=click.Choice(["ort", "trt_plugin", "trt_native", "reference"]), default="ort",
              show_default=True, help="ort: onnxruntime's fused operators; trt_plugin: TensorRT with our plugins; "
              "trt_native: TensorRT's own layers; reference: standard ONNX only.")  # fmt: skip
@click.option("--kv-update", type=click.Choice(["select", "layer"]), default="select", show_default=True,
              help="How trt_native writes its cache; layer: in place, with TensorRT 11 or newer.")  # fmt: skip
@click.option("--max-len", type=click.IntRange(1), help="Longest context.  [default: the model's, at most 4096]")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]),
              help="Of a plain model rounded to int4.  [default: 128]")  # fmt: skip
@click.option("--embedding-bits", type=click.Choice(["16", "8", "4"]),
              help="Bits of the embedding table.  [default: as quantize was told]")  # fmt: skip
@click.option("--tie/--no-tie", default=None,
              help="Store packed head and embedding once, as one table.  [default: as quantize made them]")  # fmt: skip
@click.option("--kv-bits", type=click.Choice(["16", "8"]),
              help="8: an int8 KV cache.  [default: 8 where MODEL holds its scales]")  # fmt: skip
@click.option("--lora-targets", default="", metavar="NAMES",
              help="Linears that adapters may change at run time: q_proj,v_proj or all.")  # fmt: skip
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="What onnxruntime will run on.")  # fmt: skip
@click.option("--accuracy-level", type=click.IntRange(0, 4),
              help="Of MatMulNBits; 4: int8 activations.  [default: 4 on cpu, 0 on cuda]")  # fmt: skip
@overwrite_option
@example(
    "orin-kit export student-int4 --out student-onnx",
    "orin-kit export student -o student-fp16 --precision fp16",
    "orin-kit export student -o student-rounded --precision int4",
    "orin-kit export student-int4 -o student-trt --dialect trt_plugin",
)
def export(
    model: Path, out: Path, group_size: str | None, embedding_bits: str | None, kv_bits: str | None,
    lora_targets: str, **options: Any,
) -> None:  # fmt: skip
    """Export MODEL, plain or quantized, to ONNX with an in-place KV cache; one graph does prefill and decode.

    A plain MODEL is rounded to nearest on the way with --precision int4; `quantize` loses less.
    """
    from orin_kit.export.export import export as run

    results = run(
        model, out, group_size=int(group_size) if group_size else None,
        embedding_bits=int(embedding_bits) if embedding_bits else None, kv_bits=int(kv_bits) if kv_bits else None,
        lora_targets=[name.strip() for name in lora_targets.split(",") if name.strip()], **options,
    )  # fmt: skip
    click.echo(f"wrote {out} ({results['model_bytes'] / 1e6:.1f} MB)")


@cli.command("build-engine")
@click.argument("onnx", type=DIRECTORY)
@click.option("--out", "-o", type=DIRECTORY, help="The directory to write.")
@click.option("--kv", type=click.Choice(["plugin", "native"]), default="plugin", show_default=True,
              help="Who attends and keeps the cache: our plugins, or TensorRT's own layers.")  # fmt: skip
@click.option("--max-batch", type=click.IntRange(1), default=1, show_default=True, help="Rows at once.")
@click.option("--max-len", type=click.IntRange(1), help="Tokens of a row's cache.  [default: all that ONNX allows]")
@click.option("--prefill", type=click.IntRange(1),
              help="Tokens of a prompt in one step; longer ones take several.  [default: at most 512]")  # fmt: skip
@click.option("--opt-prefill", type=click.IntRange(1),
              help="Prompt length that kernels are chosen for.  [default: at most 128]")  # fmt: skip
@click.option("--logits", type=click.IntRange(1), default=16, show_default=True,
              help="Positions scored in one step.")  # fmt: skip
@click.option("--lora-rank", type=click.IntRange(0), default=0, show_default=True,
              help="Largest rank of adapters, where ONNX takes some.")  # fmt: skip
@click.option("--workspace", "workspace_mb", type=click.IntRange(1), metavar="MB",
              help="Memory for intermediate results of a layer.  [default: TensorRT's]")  # fmt: skip
@click.option("--level", type=click.IntRange(0, 5), default=3, show_default=True,
              help="TensorRT's optimization level: 0 builds fastest, 5 runs fastest.")  # fmt: skip
@click.option("--timing-cache", type=FILE, help="Kernels measured before.  [default: in ~/.cache/orin-kit]")
@click.option("--refit", is_flag=True, help="Let the engine take other weights later.")
@click.option("--refit-from", type=DIRECTORY, help="An engine built with --refit: only put ONNX's weights into it.")
@click.option("--weight-streaming", is_flag=True, help="Let weights stay out of GPU memory; slower.")
@click.option("--plugins", type=FILE, help="The plugin library.  [default: $ORIN_KIT_PLUGINS, or where it was built]")
@click.option("--memory-check/--no-memory-check", "check_memory", default=True, show_default=True,
              help="Refuse to build with less memory than the estimate.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be built, and build nothing; needs no TensorRT.")
@click.option("--tensorrt", metavar="VERSION", help="Version that --dry-run plans for.  [default: installed, or 10.3]")
@click.option("--json", "as_json", is_flag=True, help="Print --dry-run's plan as one JSON object.")
@overwrite_option
@example(
    "orin-kit build-engine student-onnx --out student-engine",
    "orin-kit build-engine student-onnx --dry-run --tensorrt 10.16",
    "orin-kit build-engine student-onnx -o engine --max-len 2048 --level 5 --refit",
    "orin-kit build-engine student-2-onnx -o engine-2 --refit-from engine",
)
def build_engine(
    onnx: Path, out: Path | None, dry_run: bool, tensorrt: str | None, as_json: bool, plugins: Path | None,
    refit_from: Path | None, check_memory: bool, overwrite: bool, **options: Any,
) -> None:  # fmt: skip
    """Build a TensorRT engine from ONNX (`export --dialect trt_plugin`), on the Orin that will run it."""
    from orin_kit.engine.build import Options, plan_engine
    from orin_kit.engine.build import build_engine as run

    chosen = Options(**options)
    if dry_run:
        from orin_kit.engine.report import plan_json, print_plan

        source, plan = plan_engine(onnx, chosen, tensorrt=tensorrt)
        if as_json:
            click.echo(plan_json(source, plan))
        else:
            print_plan(source, plan)
        return
    if out is None:
        raise click.UsageError("Missing option '--out' / '-o'.")
    results = run(
        onnx, out, chosen, plugins=plugins, refit_from=refit_from, check_memory=check_memory, overwrite=overwrite
    )
    click.echo(f"wrote {out} ({results['model_bytes'] / 1e6:.1f} MB, built in {results['build_seconds']:.0f} s)")


@cli.command()
@click.argument("artifact", type=DIRECTORY)
@out_option
@click.option("--prompt-lengths", default="32,128,512", show_default=True, help="Tokens, separated by commas.")
@click.option(
    "--new-tokens",
    type=click.IntRange(2),
    default=32,
    show_default=True,
    help="Tokens of an answer; the first comes from the prefill.",
)
@click.option("--batch-sizes", default="1", show_default=True, help="Rows, separated by commas.")
@click.option("--warmup", type=click.IntRange(0), default=2, show_default=True, help="Runs not counted.")
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True, help="Runs counted.")
@click.option("--targets", type=FILE, help="Targets (.yaml).  [default: TTFT 150 ms, TPOT 38 ms, memory 1.1 GB]")
@threads_option
@overwrite_option
@example(
    "orin-kit profile student-onnx --out profile",
    "orin-kit profile student-onnx -o profile --prompt-lengths 64,256 --batch-sizes 1,4 --repeats 20",
)
def profile(artifact: Path, out: Path, prompt_lengths: str, batch_sizes: str, **options: Any) -> None:
    """Measure TTFT, TPOT and memory of ARTIFACT and judge them against targets.

    Exit code 3 when a target is missed. The report is a table, report.json and a self-contained report.html.
    """
    from orin_kit.profile.profile import profile as run

    lengths, sizes = _numbers("--prompt-lengths", prompt_lengths), _numbers("--batch-sizes", batch_sizes)
    report = run(artifact, out, prompt_lengths=lengths, batch_sizes=sizes, **options)
    click.echo(f"wrote {out}")
    if not all(verdict.passed for verdict in report.verdicts):
        sys.exit(EXIT_TARGET_MISSED)


@cli.command()
@click.argument("artifact", type=DIRECTORY)
@click.option("--prompt", help="Answer this one message and leave.")
@click.option("--system", help="The system message.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the K likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens up to this sum.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Drop tokens below this share of the best.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: repeat less.")
@click.option("--seed", type=int, help="For the same answer again.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of one answer.")
@click.option("--max-len", type=click.IntRange(1), help="Context, prompt and answers.  [default: at most 1024]")
@click.option("--adapter", type=DIRECTORY, help="A LoRA adapter that PEFT saved; needs export --lora-targets.")
@click.option("--stats", is_flag=True, help="Say TTFT and TPOT after every answer.")
@threads_option
@provider_option
@example(
    "orin-kit chat student-onnx",
    'orin-kit chat student-onnx --prompt "What is 12 x 7?"',
    "echo hello | orin-kit chat student-onnx",
)
def chat(
    artifact: Path, prompt: str | None, system: str | None, max_new_tokens: int, max_len: int | None, stats: bool,
    adapter: Path | None, threads: int | None, provider: str, **sampling: Any,
) -> None:  # fmt: skip
    """Talk to ARTIFACT in the terminal: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."""
    from orin_kit.chat.terminal import chat as run
    from orin_kit.runtime.runtime import open_runtime
    from orin_kit.runtime.sampler import Sampling

    chosen = Sampling(**sampling)
    runtime = open_runtime(artifact, max_len=max_len, threads=threads, provider=provider, adapter=adapter)
    sys.exit(
        run(runtime, sampling=chosen, max_new_tokens=max_new_tokens, system=system, prompt=prompt, show_stats=stats)
    )


@cli.command("inspect")
@click.argument("directory", type=DIRECTORY)
@click.option("--context", type=click.IntRange(1), help="Tokens before the one timed.  [default: at most 1024]")
@click.option("--prompt-length", type=click.IntRange(1), help="Of the prompt timed.  [default: at most 128]")
@click.option("--verify", is_flag=True, help="Compare every sha256 of the manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@example("orin-kit inspect student-onnx", "orin-kit inspect student --context 4096 --prompt-length 512 --json")
def inspect_directory(directory: Path, as_json: bool, **options: Any) -> None:
    """Say what DIRECTORY is: sizes, bytes by kind, operators, cache, and the latency predicted on an Orin.

    Any checkpoint or artifact; weights are not loaded. Files that contradict config.json are said.
    """
    from orin_kit.inspect.inspect import inspect as run
    from orin_kit.inspect.report import print_inspection

    found = run(directory, **options)
    if as_json:
        click.echo(found.model_dump_json(by_alias=True, indent=2))
    else:
        print_inspection(found)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@example("orin-kit doctor", "orin-kit doctor --json")
def doctor(as_json: bool) -> None:
    """Say whether this machine can run models on an Orin, and what to do about what is missing.

    Exit code 1 when something needed is missing; optional lines only cost speed.
    """
    from orin_kit.doctor.doctor import doctor as run
    from orin_kit.doctor.report import print_report

    report = run()
    if as_json:
        click.echo(report.model_dump_json(by_alias=True, indent=2))
    else:
        print_report(report)
    if not report.ok:
        sys.exit(EXIT_INTERNAL)


@cli.command()
@click.option(
    "--out", "-o", type=DIRECTORY, default=Path("demo-out"), show_default=True, help="The directory to write."
)
@click.option("--fast", is_flag=True, help="A minute, with training too short to learn much.")
@overwrite_option
@example("orin-kit demo", "orin-kit demo --fast --out /tmp/demo --overwrite")
def demo(out: Path, fast: bool, overwrite: bool) -> None:
    """Run the whole chain on the demo family: distil, quantize, export, profile, and compare, in about 4 minutes."""
    from orin_kit.demo import demo as run

    run(out, fast=fast, overwrite=overwrite)


def main() -> None:
    """Run the command line; every failure is one line and an exit code (2: the user's, 1: ours, 3: target missed)."""
    debug = "--debug" in sys.argv
    try:
        code = cli.main(args=_debug_anywhere(sys.argv[1:]), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_INTERNAL)
    except Exception as error:
        if debug:
            raise
        what, code = explain(error)
        click.echo(f"orin-kit: {what}", err=True)
        sys.exit(code)
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: Exception) -> tuple[str, int]:
    """One line for a failure, with what mends it, and the exit code."""
    if isinstance(error, OrinKitError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("orin_kit"):
        return f"{error.name} is not installed: pip install 'orin-kit[host]', or '.[host]' in a checkout", EXIT_USER
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"the disk is full{where}: make room and run the command again", EXIT_USER
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission{where}: choose a place of yours or change its permissions", EXIT_USER
        return f"{error.strerror or error}{where}: {ISSUES}", EXIT_INTERNAL
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's, of GPUs
        return "out of memory: use a smaller batch, a shorter context or a smaller model", EXIT_INTERNAL
    return f"{type(error).__name__}: {' '.join(str(error).split())}: {ISSUES}", EXIT_INTERNAL


def _debug_anywhere(args: list[str]) -> list[str]:
    """`--debug` belongs to the group, but people add it where the error was: at the end."""
    rest = [a for a in args if a != "--debug"]
    return ["--debug", *rest] if len(rest) < len(args) else rest


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{text!r} is not a list of positive whole numbers", param_hint=option)
    return numbers
