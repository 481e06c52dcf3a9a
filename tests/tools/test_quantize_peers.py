"""tools/bench/quantize_peers.py: that its evaluator says what transformers says, and that its tables are right."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import quantize_peers as tool
import torch
from quantize_report import cells, markdown
from quantize_scores import Judge, example_batches, last_states, write_plain
from transformers import AutoModelForCausalLM

from families import DEMO_TEACHER
from orin_kit.data.packing import Example, tokenize_chat
from orin_kit.data.tasks import distinct
from orin_kit.quantize.perplexity import perplexity
from orin_kit.quantize.quantize import quantize
from orin_kit.tokenizer import ChatTokenizer

STUDENT = DEMO_TEACHER.parent / "demo-student"


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    tokenizer = ChatTokenizer(STUDENT)
    chats = [task.chat() for task in distinct("test", seed=5, count=37)]
    return [tokenize_chat(tokenizer, chat) for chat in chats]


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo student, head and all, rounded to INT4."""
    out = tmp_path_factory.mktemp("int4") / "student"
    quantize(STUDENT, out, method="rtn", perplexity=False)
    return out


def answers(directory: Path, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers says of every asked token: log probabilities fp64 `[tokens, vocab]`, and the tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    said, asked = [], []
    with torch.no_grad():
        for example in examples:
            ids, trained = torch.tensor(example.ids), torch.tensor(example.trained)[1:]
            said.append(model(ids[None]).logits[0, :-1][trained].double().log_softmax(-1))
            asked.append(ids[1:][trained])
    return torch.cat(said), torch.cat(asked)


def test_scores_are_those_of_transformers(examples: list[Example], int4: Path, tmp_path: Path) -> None:
    write_plain(int4, tmp_path / "plain")
    expected, tokens = answers(STUDENT, examples)
    found, _ = answers(tmp_path / "plain", examples)
    scores = Judge(STUDENT, example_batches(examples)).scores(int4)
    nll = -found.gather(1, tokens[:, None]).mean().item()
    assert scores["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(perplexity(int4, examples), rel=1e-5)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert scores["divergence"] == pytest.approx(divergence, rel=1e-3)
    assert scores["agreement"] == pytest.approx((expected.argmax(-1) == found.argmax(-1)).double().mean().item())
    assert 1e-4 < scores["divergence"] < 0.1


def test_the_fp16_model_is_no_distance_from_itself(examples: list[Example]) -> None:
    scores = Judge(STUDENT, example_batches(examples)).scores(STUDENT)
    assert scores["divergence"] == pytest.approx(0, abs=1e-9)
    assert scores["agreement"] == 1


def test_examples_without_an_answer_are_left_out(examples: list[Example]) -> None:
    mute = Example([1, 2, 3], [False] * 3)
    with_it, without = (example_batches(some) for some in ([mute, *examples], examples))
    states, _ = last_states(STUDENT, with_it)
    assert len(states) == sum(sum(example.trained[1:]) for example in examples)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(with_it, without, strict=True))


def test_a_line_has_means_and_deviations() -> None:
    rows = [{"divergence": d, "perplexity": p, "seconds": 3.2} for d, p in ((0.001, 2.0), (0.003, 2.5))]
    assert cells(rows, ["perplexity", "divergence", "seconds"]) == ["2.2500 ± 0.3536", "2.000 ± 1.414", "3"]
    assert cells(rows[:1], ["perplexity"]) == ["2.0000"]


def test_results_are_ordered_as_the_cases_whenever_they_were_measured() -> None:
    first, second = tool.CASES[1].name, tool.CASES[2].name
    rows = [
        {"model": model, "case": case, "seed": seed, "perplexity": 1.0, "divergence": 0.0}
        for model, case, seed in (
            ("b", second, 0),
            ("a", second, 1),
            ("a", first, 0),
            ("a", second, 0),
            ("b", first, 0),
        )
    ]
    ordered = tool.in_order(rows)
    assert [(row["model"], row["case"], row["seed"]) for row in ordered] == [
        ("b", first, 0), ("b", second, 0), ("a", first, 0), ("a", second, 0), ("a", second, 1),
    ]  # fmt: skip
    lines = markdown({"results": ordered}).splitlines()
    assert lines[0] == "### b"
    assert lines[4].startswith(f"| {first} | 1.0000 |")
    assert lines[-1].startswith(f"| {second} | 1.0000 ± 0.0000 |")


def test_a_peer_that_is_not_there_is_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(
        demo=[("student", STUDENT)], text=[], gsm8k=None, llm_compressor=None, modelopt=None, seeds=1, samples=8,
        sample_length=128, chats=8, questions=8, only=None, threads=1, json=tmp_path / "found.json",
    )  # fmt: skip
    options.only = ["fp16", "orin-kit rtn", "peer", "modelopt rtn"]
    report = tool.run(options, tmp_path)
    ours = [case.name for case in tool.CASES if case.name.startswith("orin-kit rtn")]
    assert [row["case"] for row in report["results"]] == ["fp16", *ours]
    assert all(0 <= row["exact_match"] <= 1 for row in report["results"])
    assert "modelopt rtn: left out, give --modelopt" in capsys.readouterr().err
    # Known results stay: nothing is run, even if it could not be.
    options.demo = [("student", STUDENT)]
    before = options.json.read_text("utf-8")
    tool.run(options, tmp_path)
    assert options.json.read_text("utf-8") == before


def test_a_peers_failure_shows_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module\nexit 3\n")
    broken.chmod(0o755)
    options = argparse.Namespace(llm_compressor=broken, modelopt=None, samples=8, sample_length=128, threads=1)
    subject = tool.Subject("student", STUDENT, None, Judge.__new__(Judge), 0)
    case = tool.Case("llm-compressor rtn", "llm-compressor", {"method": "rtn"})
    with pytest.raises(SystemExit, match=r"llm-compressor rtn failed:\nno such module"):
        tool.make(case, subject, 0, tmp_path / "out", options)
    assert np.load(tmp_path / "out.npy").shape == (8, 128)
