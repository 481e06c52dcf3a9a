"""A training step of distillation, side by side: orin-kit's task loss, TRL's DistillationTrainer, arcee's DistillKit.

    python tools/bench/distill_peers.py --distillkit ~/DistillKit --json peers.json

TRL and its `datasets` come from the `bench` extra; DistillKit is a checkout (its package pins another TRL). Cases in
pairs have the same objective, and their losses, step by step, say whether they really are the same:

    dense kl      KL(teacher || student) at T 1                        orin-kit, trl (beta 0)
    ce + kl       half of it cross-entropy, half KL at T 2 times 4     orin-kit, distillkit (online teacher)
    ce + kl + hs  the same, and mean square of hidden states           orin-kit's task loss + torch, distillkit
    stored top-k  cross-entropy and KL at T 1 to k stored tokens       orin-kit (TopK), distillkit (offline teacher)

All of them train one random-weight Qwen2 pair on one batch, in fp32, in `transformers.Trainer` (which both peers are
built on) with AdamW: only the loss differs. The peers' own code runs, with one cut: TRL's trainer learns from what the
student generates, and here it is handed the batch in place of generated text. Each case runs in a fresh process, the
cases take turns. Peaks are above what is resident when training begins, with both models loaded: gradients and the
optimizer's state are in all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from logits_kd import Clock, Peak, in_turns, summary
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

TOKENIZER = Path(__file__).parents[2] / "calibration/demo-teacher"  # the peers want one; nothing is tokenized
PAIRS = {
    "dense kl": ("orin-kit dense kl", "trl dense kl"),
    "ce + kl": ("orin-kit ce + kl", "distillkit ce + kl"),
    "ce + kl + hs": ("orin-kit ce + kl + hs", "distillkit ce + kl + hs"),
    "stored top-k": ("orin-kit stored top-k", "distillkit stored top-k"),
}
TEMPERATURES = {"dense kl": 1.0, "ce + kl": 2.0, "ce + kl + hs": 2.0, "stored top-k": 1.0}
LAYERS = [(1, 1), (2, 2)]  # of student and teacher, hidden states being counted from the embedding
Build = Callable[[argparse.Namespace], Trainer]


def model(options: argparse.Namespace, width: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=options.vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=options.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=2 / width**0.5,  # logits of standard deviation 2, as trained models have
        use_cache=False,
    )
    return Qwen2ForCausalLM(config)


def pair(options: argparse.Namespace) -> tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]:
    teacher = model(options, options.teacher_hidden, 1).eval().requires_grad_(False)
    return model(options, options.hidden, 2), teacher


def batch(options: argparse.Namespace) -> Tensor:
    """`[1, positions + 1]`: every token but the first is asked for."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, options.vocab, (1, options.positions + 1), generator=generator)


def dataset(options: argparse.Namespace, **columns: Tensor) -> Any:
    """The same batch for every step, so that the losses of two trainers can be compared step by step."""
    from datasets import Dataset

    columns = {"input_ids": batch(options), **columns}
    return Dataset.from_dict({name: tensor.tolist() * options.steps for name, tensor in columns.items()})


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Of `TrainingArguments` and of the peers' configs, which have other defaults."""
    return dict(
        output_dir=options.scratch,
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1000,
    )


def stored_top_k(teacher: PreTrainedModel, options: argparse.Namespace) -> Any:
    from orin_kit.distill.logits import Dense, top_k

    with torch.no_grad():
        hidden = teacher.model(batch(options)).last_hidden_state
    return top_k(Dense(hidden.flatten(0, 1), teacher.lm_head.weight), options.k, (1.0,))


def orin_kit(options: argparse.Namespace) -> Trainer:
    """orin-kit's loss in the trainer that the peers are built on, so that nothing but the loss differs."""
    from orin_kit.distill.logits import Dense, TopK, task_loss

    student, teacher = pair(options)
    kind = options.case.removeprefix("orin-kit ")
    deep, stored = kind == "ce + kl + hs", stored_top_k(teacher, options) if kind == "stored top-k" else None
    if deep:
        student.projections = projections(options)

    def loss_at(model: Any, ids: Tensor, asked: slice, teacher_weight: float) -> Tensor:
        """Over the `asked` tokens of every row; the label of each is the next one, the last one's the first."""
        out = model.model(ids, output_hidden_states=deep)
        flat = lambda tensor: tensor[:, asked].flatten(0, 1)  # noqa: E731
        if stored:
            parts = (flat(tensor.unflatten(0, ids.shape)) for tensor in (stored.ids, stored.logits, stored.tails))
            signal: Dense | TopK = TopK(*parts, temperatures=stored.temperatures)
        else:
            with torch.no_grad():
                taught = teacher.model(ids, output_hidden_states=deep)
            signal = Dense(flat(taught.last_hidden_state), teacher.lm_head.weight)
        loss = task_loss(
            Dense(flat(out.last_hidden_state), model.lm_head.weight),
            flat(ids.roll(-1, 1)),
            signal,
            teacher_weight=teacher_weight,
            temperature=TEMPERATURES[kind],
        ).loss
        if not deep:
            return loss
        pairs = zip(model.projections, LAYERS, strict=True)
        distances = [(to(out.hidden_states[s]) - taught.hidden_states[t]).pow(2).mean() for to, (s, t) in pairs]
        # DistillKit divides by the sum of its weights: 0.5, 0.5 and 1.
        return (loss + torch.stack(distances).mean()) / 2

    class OrinKitTrainer(Trainer):  # type: ignore[misc]
        as_the_peer: float | None = None

        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            return loss_at(model, inputs["input_ids"], slice(-1), 1.0 if kind == "dense kl" else 0.5)

    trainer = OrinKitTrainer(student, TrainingArguments(**settings(options)), collate, dataset(options))
    if kind != "dense kl":
        # DistillKit's KL is also over each row's last token, which has no next one; its cross-entropy is not.
        with torch.no_grad():
            ce, kl = (
                loss_at(student, batch(options), slice(-1), 0.0),
                loss_at(student, batch(options), slice(None), 1.0),
            )
        trainer.as_the_peer = (ce + kl).item() / 2
    return trainer


def projections(options: argparse.Namespace) -> nn.ModuleList:
    """As DistillKit makes them, from the same random numbers."""
    torch.manual_seed(4)
    made = [nn.Linear(options.hidden, options.teacher_hidden, bias=False) for _ in LAYERS]
    for projection in made:
        nn.init.xavier_uniform_(projection.weight)
    return nn.ModuleList(made)


def trl(options: argparse.Namespace) -> Trainer:
    """`DistillationTrainer` itself: its loss, its step. Only its generation is replaced by the batch."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class GivenText(DistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            ids = batch(options)
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": torch.ones_like(ids[:, :1]),
                "completion_ids": ids[:, 1:],
                "completion_mask": torch.ones_like(ids[:, 1:]),
                "num_items_in_batch": torch.tensor(float(ids[:, 1:].numel())),
            }

    student, teacher = pair(options)
    config = DistillationConfig(beta=0.0, temperature=TEMPERATURES["dense kl"], **settings(options))
    prompts = Dataset.from_dict({"prompt": ["1 + 1 ="] * options.steps})
    return GivenText(student, teacher, config, prompts, processing_class=AutoTokenizer.from_pretrained(TOKENIZER))


def distillkit(options: argparse.Namespace) -> Trainer:
    """DistillKit's own trainer, losses and signal sources, from a checkout."""
    sys.path.insert(0, str(options.distillkit))
    from distillkit.compression import LogprobCompressor
    from distillkit.compression.config import DistributionQuantizationConfig
    from distillkit.configuration import DistillationRunConfig
    from distillkit.hsd_mapping import HiddenStateMapping
    from distillkit.signals import OfflineSignalSource, OnlineSignalSource
    from distillkit.trainer import DistillationTrainer
    from trl import SFTConfig

    student, teacher = pair(options)
    kind = options.case.removeprefix("distillkit ")
    offline, mapping = kind == "stored top-k", None
    kl = {"function": "kl", "weight": 0.5, "temperature": TEMPERATURES[kind]}
    losses: list[dict[str, Any]] = [{"function": "cross_entropy", "weight": 0.5}, kl]
    columns: dict[str, Tensor] = {"labels": batch(options)}
    if kind == "ce + kl + hs":
        torch.manual_seed(4)
        losses.append({"function": "hs_mse", "weight": 1.0})
        mapping = HiddenStateMapping(student, options.teacher_hidden, LAYERS)
    if offline:
        kl["missing_probability_handling"] = "symmetric_uniform"
        compression = DistributionQuantizationConfig(
            d=options.vocab, k=options.k, exact_k=options.k, residual_bins=[], delta_encoding=False
        )
        source = OfflineSignalSource(LogprobCompressor(compression), vocab_size=options.vocab)
        found = stored_top_k(teacher, options)
        whole = torch.cat([found.logits, found.tails], dim=-1).logsumexp(-1, keepdim=True)
        shape = columns["labels"].shape
        columns["token_ids"], columns["top_values"] = (t.unflatten(0, shape) for t in (found.ids, found.logits - whole))
    else:
        source = OnlineSignalSource(teacher, vocab_size=options.vocab)
    config = DistillationRunConfig.model_validate(
        {
            "model": "student",
            "dataset": {"train_dataset": {"disk_path": "none"}, "prepacked": True},
            "teacher": {"kind": "hf", "path": "teacher"},
            "sequence_length": columns["labels"].shape[1],
            "output_path": str(options.scratch),
            "loss_functions": losses,
        }
    )
    return DistillationTrainer(
        student,
        config,
        source,
        options.vocab,
        args=SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **settings(options)),
        hidden_state_mapping=mapping,
        train_dataset=dataset(options, **columns),
        data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
    )


BUILDERS: dict[str, Build] = {"orin-kit": orin_kit, "trl": trl, "distillkit": distillkit}


class Watch(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, and the peak since training began."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.peak = Peak()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.stop()


def run_case(options: argparse.Namespace) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    trainer, watch = BUILDERS[options.case.split()[0]](options), Watch()
    trainer.add_callback(watch)
    losses: list[float] = []
    compute = trainer.compute_loss

    def compute_loss(*arguments: Any, **named: Any) -> Any:
        loss = compute(*arguments, **named)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    found = {"baseline_mib": watch.peak.before, "peak_mib": watch.peak.mib()}
    found |= {"cpu": watch.clock.cpu, "wall": watch.clock.wall}
    print(json.dumps(found | {"losses": losses, "as_the_peer": getattr(trainer, "as_the_peer", None)}))


def show(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"One training step: {options.positions:,} positions, vocabulary {options.vocab:,}, "
        f"{options.layers} layers each, {options.hidden} wide under {options.teacher_hidden}, fp32"
    )
    for column in ("case", "peak above start, MiB", "CPU s a step", "wall s", "loss of each step"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for ours, theirs in PAIRS.values():
        if theirs not in results:
            continue
        rows = {case: summary(results[case]) for case in (ours, theirs)}
        for case, row in rows.items():
            losses = " ".join(f"{loss:.5f}" for loss in results[case][0]["losses"])
            table.add_row(case, f"{row['peak_mib']:,.0f}", f"{row['cpu']:.2f}", f"{row['wall']:.2f}", losses)
        as_theirs = results[ours][0]["as_the_peer"]
        ratios = (rows[theirs][key] / rows[ours][key] for key in ("peak_mib", "cpu", "wall"))
        note = "" if as_theirs is None else f"first, by the peer's definition: {as_theirs:.5f}"
        table.add_row("  peer / orin-kit", *(f"{ratio:.2f}" for ratio in ratios), note, end_section=True)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "positions": 2048,
        "vocab": 151_936,
        "hidden": 512,
        "teacher-hidden": 1024,
        "layers": 2,
        "k": 64,
    }
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--distillkit", type=Path, help="a checkout of github.com/arcee-ai/DistillKit")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--steps", type=int, default=3, help="in each process; the first is not counted")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options)
        return
    cases = [case for name in options.pairs for case in PAIRS[name]]
    if not options.distillkit:
        print("no --distillkit: its cases are left out", file=sys.stderr)
        cases = [case for name in options.pairs if name == "dense kl" for case in PAIRS[name]]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [*sys.argv[1:], "--scratch", scratch]
        results = in_turns(__file__, cases, options.repeats, options.threads, arguments)
    show(results, options)
    if options.json:
        used = {
            key: value for key, value in vars(options).items() if key not in ("json", "case", "scratch", "distillkit")
        }
        options.json.write_text(json.dumps({"settings": used, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
