"""Time and memory of one step of attention distillation: orin-kit's loss in blocks, and one over whole maps.

    python tools/bench/attention_memory.py --json attention-memory.json

The step is the teacher's forward pass, the student's, the loss of four layers on 60 % of the teacher's heads, and
backward. "Whole maps" is how it is usually written: eager attention, `output_attentions=True`, KL of the maps.
Heads are those of Qwen2.5 7B and 1.5B (28 on 4, 12 on 2, of 128); depth and widths are smaller, so that it fits a desk.
Each case runs in a fresh process, the cases take turns, and the process reports its own peak. glibc keeps much of what
is freed; with MALLOC_MMAP_THRESHOLD_=262144 in the environment the peak is nearer to what is alive, and steps slower.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from logits_kd import Clock, Peak, in_turns, summary

CASES = ("orin-kit", "whole maps")
LAYERS = (4, 5, 6, 7)
DEPTH = 8
KEPT = tuple(range(17))  # 60 % of 28


def run_case(options: argparse.Namespace) -> None:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

    from orin_kit.distill.attention import HeadMixing, attention_loss
    from orin_kit.distill.record import recorded_attention

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def model(heads: int, kv_heads: int, width: int) -> PreTrainedModel:
        shape = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, hidden_size=width)
        shape |= dict(num_hidden_layers=DEPTH, intermediate_size=2 * width, vocab_size=1024)
        return Qwen2ForCausalLM(Qwen2Config(**shape, initializer_range=0.1))  # large, for maps that are far from even

    teacher = model(28, 4, options.teacher_hidden).eval().requires_grad_(False)
    student = model(12, 2, options.hidden)
    mixers = torch.nn.ModuleList(HeadMixing(12, KEPT, 28) for _ in LAYERS)
    ids = torch.randint(0, 1024, (1, options.length))
    documents = torch.zeros_like(ids)

    def ours() -> Tensor:
        with torch.no_grad(), recorded_attention(teacher, LAYERS) as targets:
            teacher.get_decoder()(ids, use_cache=False)
        with recorded_attention(student, LAYERS) as own:
            student.get_decoder()(ids, use_cache=False)
        pairs = zip(LAYERS, mixers, strict=True)
        return torch.stack([attention_loss(own[n], targets[n], documents, mix, KEPT) for n, mix in pairs]).mean()

    def whole() -> Tensor:
        with torch.no_grad():
            targets = teacher.get_decoder()(ids, use_cache=False, output_attentions=True).attentions
        own = student.get_decoder()(ids, use_cache=False, output_attentions=True).attentions
        losses = []
        for layer, mix in zip(LAYERS, mixers, strict=True):
            p, q = targets[layer][:, KEPT], mix(own[layer])
            log_q = q.clamp(min=torch.finfo(q.dtype).tiny).log()
            losses.append(torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1).mean())
        return torch.stack(losses).mean()

    if options.case == "whole maps":
        for one in (teacher, student):
            one.set_attn_implementation("eager")
    peak, clock, loss = Peak(), Clock(), torch.zeros(())
    for _ in range(options.steps):
        student.zero_grad()
        mixers.zero_grad()
        clock.start()
        loss = ours() if options.case == "orin-kit" else whole()
        loss.backward()  # type: ignore[no-untyped-call]
        clock.stop()
    found = {"baseline_mib": peak.before, "peak_mib": peak.mib(), "cpu": clock.cpu, "wall": clock.wall}
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    print(json.dumps(found | {"loss": loss.item(), "gradient_norm": norm.item()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens in the row")
    parser.add_argument("--whole-up-to", type=int, default=1024, help="at 2,048 tokens whole maps take some 14 GB")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="in each process; the first is not counted")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options)
        return
    results = {}
    for length in options.lengths:
        cases = CASES if length <= options.whole_up_to else CASES[:1]
        arguments = [*sys.argv[1:], "--length", str(length)]
        results[length] = in_turns(__file__, cases, options.repeats, options.threads, arguments)
    show(results)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "case", "length")}
        options.json.write_text(json.dumps({"settings": settings, "runs": results}, indent=1) + "\n")


def show(results: dict[int, dict[str, list[dict[str, Any]]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Attention distillation, {len(LAYERS)} of {DEPTH} layers, {len(KEPT)} of 28 heads under 12, fp32"
    )
    for column in ("tokens", "loss on", "peak above start, MiB", "CPU s a step", "s a step", "loss", "gradient norm"):
        table.add_column(column, justify="left" if column == "loss on" else "right")
    for length, cases in results.items():
        for case, runs in cases.items():
            row = summary(runs)
            figures = f"{row['peak_mib']:,.0f}", f"{row['cpu']:.2f}", f"{row['wall']:.2f}"
            table.add_row(f"{length:,}", case, *figures, f"{runs[0]['loss']:.6g}", f"{runs[0]['gradient_norm']:.6g}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
