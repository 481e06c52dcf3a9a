"""`orin-kit traces`: a teacher's reasoning as training data, in the way of R1's distilled models (arXiv:2501.12948).

Each question is answered several times by sampling; what passes the verifiers and is not said twice becomes a chat that
a recipe's `data.chats` can name. Sampling is the dear part, so replies are kept as they come: a killed run, or one
whose rules rejected everything, goes on from them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orin_kit.data.chat import Chat, Message
from orin_kit.data.questions import Question, read_questions, task_questions
from orin_kit.errors import UserError
from orin_kit.manifest import check_free, sha256_input, write_artifact
from orin_kit.runtime.sampler import Sampling
from orin_kit.tokenizer import ChatTokenizer
from orin_kit.traces.answer_store import AnswerStore
from orin_kit.traces.selection import read_keep, select
from orin_kit.traces.teacher import Reply, context_of, is_onnx, open_teacher
from orin_kit.traces.verifiers import OPEN, Answer, Rules, mend_for

TRACES, REJECTED = "traces.jsonl", "rejected.jsonl"


@dataclass(frozen=True)
class Asking:
    """How the teacher is asked; together with teacher and questions it decides every reply.

    Attributes:
        samples: replies to each question.
        temperature, top_p: of the sampling (see `Sampling`).
        max_new_tokens: of a reply, its stop token included.
        batch_size: replies at once; it changes which are drawn from a transformers teacher.
        seed: of the sampling.
        system: a system message for questions that have none, for asking only: no trace has it.
    """

    samples: int = 4
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 512
    batch_size: int = 16
    seed: int = 0
    system: str | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", mend="give 1 or more")
        if self.sampling.temperature == 0 and self.samples > 1:
            what = f"at temperature 0 all {self.samples} answers to a question would be the same"
            raise UserError(what, mend="use --samples 1, or a --temperature above 0")

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p)


@dataclass(frozen=True)
class Job:
    """One reply to be made: sample number `sample` to question number `question`."""

    question: int
    sample: int
    prompt: list[int]


def traces(
    teacher: str | Path,
    out: str | Path,
    *,
    questions: str | Path | None = None,
    tasks: int | None = None,
    kinds: Sequence[str] = (),
    asking: Asking | None = None,
    rules: Rules | None = None,
    keep: str = "best",
    threads: int | None = None,
    provider: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write an artifact of kind `traces`: `traces.jsonl`, chats with the teacher's answers, and `rejected.jsonl`.

    Args:
        teacher: a transformers checkpoint, or an `onnx` artifact.
        out: the artifact to write.
        questions: a jsonl file (see `read_questions`); either this or `tasks`.
        tasks: how many synthetic problems to ask.
        kinds: of the problems; all when empty.
        asking: how the teacher is asked.
        rules: what is asked of an answer.
        keep: traces a question gets at most: "best" (one), "all", or a number.
        threads: CPU threads; all the process may use when None.
        provider: "cpu" or "cuda", of an ONNX teacher; transformers takes the GPU when there is one.
        overwrite: replace an existing artifact, and answers that another run left unfinished.
        progress: show a bar (on a terminal).

    Returns:
        The manifest's `results`: `questions`, `answers`, `passed` (the verifiers), `acceptance_rate` (passed of
        answers), `traces`, `questions_with_traces`, `mean_tokens` of a trace, and counts of `rejected` by reason.

    Raises:
        UserError: options that do not fit, a prompt longer than the context, or no answer passed.
        ArtifactError: the teacher is not whole.
    """
    asking, rules, limit = asking or Asking(), rules or Rules(), read_keep(keep)
    teacher, out = Path(teacher), Path(out)
    check_free(out, overwrite=overwrite)
    asked = _questions(questions, tasks, kinds, asking.seed)
    context = context_of(teacher)
    tokenizer = ChatTokenizer(teacher)
    rendered = [tokenizer.render(_with_system(question.prompt, asking.system), reply=True) for question in asked]
    prompts = [tokenizer.encode(text) for text in rendered]
    _check_lengths(prompts, context)
    identity = [asdict(asking), sha256_input(teacher), provider if is_onnx(teacher) else "", prompts]
    store = AnswerStore(out, hashlib.sha256(json.dumps(identity).encode()).hexdigest())
    batches = _batches(prompts, asking)
    replies = _replies(teacher, batches, asking, store, threads, provider, overwrite=overwrite, progress=progress)
    answers = [_answer(job, reply, rendered[job.question], tokenizer) for job, reply in replies]
    kept, rejected = select(answers, asked, rules, limit)
    results = _results(asked, answers, kept, [reason for _, reason in rejected])
    inputs = {"teacher": teacher} | ({"questions": Path(questions)} if questions else {})
    settings = asdict(asking) | asdict(rules) | {"keep": keep, "tasks": tasks, "kinds": list(kinds)}
    with write_artifact(out, "traces", inputs=inputs, settings=settings, overwrite=overwrite) as artifact:
        _write(artifact.directory / TRACES, (_row(answer, asked) for answer in kept))
        _write(artifact.directory / REJECTED, (_row(a, asked) | {"reason": reason} for a, reason in rejected))
        artifact.results |= results
    store.remove()
    return results


def _questions(path: str | Path | None, tasks: int | None, kinds: Sequence[str], seed: int) -> list[Question]:
    if (path is None) == (tasks is None):
        raise UserError("questions come from a file or from tasks", mend="give either --questions FILE or --tasks N")
    if path is not None:
        return read_questions(path)
    assert tasks is not None
    if tasks < 1:
        raise UserError(f"--tasks {tasks} asks no questions", mend="give 1 or more")
    return task_questions(tasks, kinds, seed)


def _with_system(prompt: Chat, system: str | None) -> Chat:
    return prompt if system is None or prompt[0].role == "system" else (Message("system", system), *prompt)


def _check_lengths(prompts: Sequence[Sequence[int]], context: int) -> None:
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) >= context:
        what = f"question {longest + 1} has {len(prompts[longest])} tokens and the teacher's context holds {context}"
        raise UserError(what, mend="shorten or remove it; the answer needs room, too")


def _batches(prompts: Sequence[list[int]], asking: Asking) -> list[list[Job]]:
    """All jobs, those of like length together; the same for every run, so that finished batches can be skipped."""
    jobs = [Job(number, sample, prompt) for number, prompt in enumerate(prompts) for sample in range(asking.samples)]
    jobs.sort(key=lambda job: (len(job.prompt), job.question, job.sample))
    return [jobs[start : start + asking.batch_size] for start in range(0, len(jobs), asking.batch_size)]


def _replies(
    teacher: Path,
    batches: Sequence[Sequence[Job]],
    asking: Asking,
    store: AnswerStore,
    threads: int | None,
    provider: str,
    *,
    overwrite: bool,
    progress: bool,
) -> list[tuple[Job, Reply]]:
    """Every job's reply, read from `store` or made now."""
    done = store.open(overwrite=overwrite)
    model = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        asked = bar.add_task("traces", total=sum(map(len, batches)))
        for number, batch in enumerate(batches):
            if number not in done:
                if model is None:
                    room = len(batches[-1][-1].prompt) + asking.max_new_tokens
                    model = open_teacher(
                        teacher, room=room, batch_size=asking.batch_size, threads=threads, provider=provider
                    )
                seeds = [_seed(asking.seed, job) for job in batch]
                done[number] = model.reply([job.prompt for job in batch], asking.sampling, seeds, asking.max_new_tokens)
                store.append(number, done[number])
            bar.advance(asked, len(batch))
    return [pair for number, batch in enumerate(batches) for pair in zip(batch, done[number], strict=True)]


def _seed(seed: int, job: Job) -> int:
    return int(hashlib.sha256(f"{seed} {job.question} {job.sample}".encode()).hexdigest()[:15], 16)


def _answer(job: Job, reply: Reply, rendered: str, tokenizer: ChatTokenizer) -> Answer:
    # Some templates open the thought themselves: then it belongs to the answer, which would otherwise only close it.
    opened = rendered[rendered.rindex(OPEN) :] if rendered.rstrip().endswith(OPEN) else ""
    text = (opened + tokenizer.decode(reply.ids)).strip()
    return Answer(job.question, job.sample, text, len(reply.ids), reply.finished)


def _results(
    questions: Sequence[Question], answers: Sequence[Answer], kept: Sequence[Answer], reasons: Sequence[str]
) -> dict[str, Any]:
    """Raises `UserError` when nothing was kept; then nothing passed a verifier, because the first that does is kept."""
    rejected = Counter(reasons)
    if not kept:
        counts = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
        what = f"none of {len(answers)} answers to {len(questions)} questions passed ({counts})"
        raise UserError(what, mend=f"{mend_for(rejected)}; the answers are kept, other rules try them again at once")
    passed = len(kept) + sum(rejected[reason] for reason in ("duplicate", "near duplicate", "surplus"))
    return {
        "questions": len(questions),
        "answers": len(answers),
        "passed": passed,
        "acceptance_rate": passed / len(answers),
        "traces": len(kept),
        "questions_with_traces": len({answer.question for answer in kept}),
        "mean_tokens": sum(answer.tokens for answer in kept) / len(kept),
        "rejected": dict(sorted(rejected.items())),
    }


def _row(answer: Answer, questions: Sequence[Question]) -> dict[str, Any]:
    """A chat in the `messages` shape of `orin_kit.data.chat`, and where it comes from."""
    chat = (*questions[answer.question].prompt, Message("assistant", answer.text))
    return {
        "messages": [asdict(message) for message in chat],
        "question": answer.question,
        "sample": answer.sample,
        "tokens": answer.tokens,
    }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
