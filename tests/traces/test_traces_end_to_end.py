"""`orin-kit traces` with the demo teacher: what is kept is right, what is rejected is not, a cut run goes on."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from families import DEMO_TEACHER
from orin_kit import cli
from orin_kit.data.chat import Message, read_chats
from orin_kit.data.tasks import distinct
from orin_kit.errors import EXIT_USER, UserError
from orin_kit.export.export import export
from orin_kit.manifest import read_manifest
from orin_kit.tokenizer import ChatTokenizer
from orin_kit.traces.traces import Asking, traces
from orin_kit.traces.transformers_teacher import TransformersTeacher
from orin_kit.traces.verifiers import Rules

HOT = Asking(samples=3, temperature=1.3, top_p=1.0, max_new_tokens=40, batch_size=30, seed=2)
TASKS = 40


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that keeps all that passes."""
    out = tmp_path_factory.mktemp("made") / "traces"
    traces(DEMO_TEACHER, out, tasks=TASKS, asking=HOT, rules=Rules(max_tokens=38), keep="all", progress=False)
    return out


def test_accepted_traces_are_right_and_complete(made: Path) -> None:
    answers = {task.question: task.answer for task in distinct("train", HOT.seed, TASKS)}
    accepted = rows(made / "traces.jsonl")
    assert len(accepted) > TASKS / 2
    for row in accepted:
        asked, said = (message["content"] for message in row["messages"])
        thought, _, answer = said.partition("</think>\n")
        assert thought.startswith("<think>")
        assert len(thought) > len("<think>")
        assert answer == answers[asked]
        assert row["tokens"] <= 38
    texts = [(row["question"], row["messages"][-1]["content"]) for row in accepted]
    assert len(set(texts)) == len(texts)
    assert read_chats(made / "traces.jsonl")  # what a recipe's data.chats reads


def test_rejected_answers_have_a_true_reason(made: Path) -> None:
    answers = [task.answer for task in distinct("train", HOT.seed, TASKS)]
    kept = {(row["question"], row["messages"][-1]["content"]) for row in rows(made / "traces.jsonl")}
    rejected = rows(made / "rejected.jsonl")
    for row in rejected:
        said, number = row["messages"][-1]["content"], row["question"]
        if row["reason"] == "cut":
            assert row["tokens"] == HOT.max_new_tokens
        elif row["reason"] == "wrong":
            assert said.rpartition("</think>")[2].split() != answers[number].split()
        elif row["reason"] == "duplicate":
            assert (number, said) in kept
        elif row["reason"] == "broken thought":
            assert (said.count("<think>"), said.count("</think>")) != (1, 1)
        else:
            assert row["reason"] in ("near duplicate", "too long", "no answer", "no thought")
    assert {"cut", "wrong", "duplicate"} <= {row["reason"] for row in rejected}
    every = sorted((row["question"], row["sample"]) for row in rejected + rows(made / "traces.jsonl"))
    assert every == [(question, sample) for question in range(TASKS) for sample in range(HOT.samples)]


def test_the_manifest_counts_what_is_in_the_files(made: Path) -> None:
    manifest = read_manifest(made, "traces", verify=True)
    accepted, rejected = rows(made / "traces.jsonl"), rows(made / "rejected.jsonl")
    reasons = Counter(row["reason"] for row in rejected)
    passed = len(accepted) + reasons["duplicate"] + reasons["near duplicate"]
    assert manifest.results == {
        "questions": TASKS,
        "answers": TASKS * HOT.samples,
        "passed": passed,
        "acceptance_rate": passed / (TASKS * HOT.samples),
        "traces": len(accepted),
        "questions_with_traces": len({row["question"] for row in accepted}),
        "mean_tokens": pytest.approx(sum(row["tokens"] for row in accepted) / len(accepted)),
        "rejected": dict(reasons),
    }
    assert manifest.settings["seed"] == HOT.seed
    assert [path.name for path in made.parent.iterdir()] == ["traces"]  # the answers' file is gone


def test_a_run_cut_short_goes_on_and_comes_to_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "traces"
    run = lambda **more: traces(  # noqa: E731
        DEMO_TEACHER, out, tasks=TASKS, **{"asking": HOT, "rules": Rules(max_tokens=38), "keep": "all",
                                           "progress": False, **more}
    )  # fmt: skip
    reply, calls = TransformersTeacher.reply, []

    def cut(self: TransformersTeacher, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reply(self, *args)

    monkeypatch.setattr(TransformersTeacher, "reply", cut)
    with pytest.raises(KeyboardInterrupt):
        run()
    store = tmp_path / ".traces.answers.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == [store.name]
    with pytest.raises(UserError, match="other settings"):
        run(asking=Asking(samples=3, seed=3))
    store.write_bytes(store.read_bytes()[:-5])  # the second batch half written
    run()
    assert len(calls) == 3 + 3  # of four batches all but the first
    for name in ("traces.jsonl", "rejected.jsonl"):
        assert (out / name).read_bytes() == (made / name).read_bytes()


def test_all_rejected_says_why_and_other_rules_need_no_new_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asking = tmp_path / "t", Asking(samples=1, max_new_tokens=64, batch_size=8)
    with pytest.raises(UserError, match=r"none of 8 answers to 8 questions passed \(too short 8\).*--min-tokens"):
        traces(DEMO_TEACHER, out, tasks=8, asking=asking, rules=Rules(min_tokens=64), progress=False)
    assert not out.exists()
    monkeypatch.delattr(TransformersTeacher, "reply")
    found = traces(DEMO_TEACHER, out, tasks=8, asking=asking, progress=False)
    assert found["traces"] > 4


def test_questions_of_a_file_without_answers(tmp_path: Path) -> None:
    questions = [task.question for task in distinct("test", 5, 6)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    asking = Asking(samples=1, temperature=0, max_new_tokens=60)
    traces(DEMO_TEACHER, tmp_path / "plain", questions=path, asking=asking, progress=False)
    said = {row["messages"][0]["content"] for row in rows(tmp_path / "plain/traces.jsonl")}
    assert said <= set(questions)
    inputs = read_manifest(tmp_path / "plain", "traces").inputs
    assert set(inputs) == {"teacher", "questions"}


def test_a_system_message_is_for_asking_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    reply = TransformersTeacher.reply
    monkeypatch.setattr(
        TransformersTeacher,
        "reply",
        lambda self, prompts, *rest: (asked.extend(prompts), reply(self, prompts, *rest))[1],
    )
    asking = Asking(samples=1, temperature=0, max_new_tokens=60, system="Think.")
    rules = Rules(check_answers=False, require_thought=False, max_repetition=1)
    traces(DEMO_TEACHER, tmp_path / "told", tasks=8, asking=asking, rules=rules, progress=False)
    tokenizer = ChatTokenizer(DEMO_TEACHER)
    questions = {Message("user", task.question) for task in distinct("train", 0, 8)}
    expected = [tokenizer.encode_chat([Message("system", "Think."), question], reply=True) for question in questions]
    assert sorted(asked) == sorted(expected)
    kept = read_chats(tmp_path / "told/traces.jsonl")
    assert kept
    assert all(chat[0] in questions and len(chat) == 2 for chat in kept)


def test_a_template_that_opens_the_thought_itself(tmp_path: Path) -> None:
    """As R1's: the reply only closes it, and the trace must have both ends."""
    shutil.copytree(DEMO_TEACHER, tmp_path / "teacher")
    template = tmp_path / "teacher/chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n' }}", "assistant\\n<think>' }}"))
    asking = Asking(samples=1, temperature=0, max_new_tokens=80)
    opened = traces(tmp_path / "teacher", tmp_path / "opened", tasks=12, asking=asking, progress=False)
    plain = traces(DEMO_TEACHER, tmp_path / "plain", tasks=12, asking=asking, progress=False)
    assert opened["traces"] == plain["traces"] > 6
    first, second = (read_chats(tmp_path / name / "traces.jsonl") for name in ("opened", "plain"))
    assert first == second


def test_an_onnx_teacher_gives_the_same_greedy_traces(tmp_path: Path) -> None:
    export(DEMO_TEACHER, tmp_path / "onnx", precision="fp32", progress=False)
    asking = Asking(samples=1, temperature=0, max_new_tokens=80, batch_size=10)
    for name, teacher in (("a", DEMO_TEACHER), ("b", tmp_path / "onnx")):
        traces(teacher, tmp_path / name, tasks=24, asking=asking, threads=1, progress=False)
    for name in ("traces.jsonl", "rejected.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def orin_kit(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["orin-kit", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--tasks", 12, "--kinds", "arithmetic, ordering", "--samples", 2, "--max-new-tokens", 80, "--keep", "2")
    assert orin_kit(monkeypatch, "traces", DEMO_TEACHER, "-o", tmp_path / "t", *options) == 0
    said = capfd.readouterr()
    results = read_manifest(tmp_path / "t", "traces").results
    assert f"{results['passed']} of 24 answers passed" in said.out
    assert all(f"  {reason}: {count}\n" in said.out for reason, count in results["rejected"].items())
    assert said.err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "5", "--questions", "q.jsonl"], "either --questions FILE or --tasks N"),
        ([], "either --questions FILE or --tasks N"),
        (["--questions", "absent.jsonl"], "no such questions file"),
        (["--questions", "long.jsonl"], r"question 2 has \d+ tokens and the teacher's context holds 1024"),
        (["--tasks", "5", "--kinds", "poems"], "no such kind"),
        (["--tasks", "5", "--temperature", "0"], "use --samples 1"),
        (["--tasks", "5", "--temperature", "-1"], "temperature"),
        (["--tasks", "5", "--top-p", "0"], "top_p"),
        (["--tasks", "5", "--keep", "few"], "--keep"),
        (["--tasks", "5", "--max-repetition", "3"], "--max-repetition"),
        (["--tasks", "5", "--min-tokens", "9", "--max-tokens", "8"], "--min-tokens"),
        (["--tasks", "4", "--max-new-tokens", "2", "--samples", "1"], r"none of 4 answers .*\(cut 4\)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text('{"question": "What?"}\n')
    Path("long.jsonl").write_text('{"question": "What?"}\n' + json.dumps({"question": "very " * 1100}))
    assert orin_kit(monkeypatch, "traces", DEMO_TEACHER, "--out", "out", *options) == EXIT_USER
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("orin-kit: ")

    assert re.search(words, error), error
    assert not Path("out").exists()


def test_a_directory_that_is_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for teacher in (tmp_path / "absent", tmp_path):
        assert orin_kit(monkeypatch, "traces", teacher, "--out", tmp_path / "out", "--tasks", 3) == EXIT_USER
        assert capfd.readouterr().err.count("\n") == 1
