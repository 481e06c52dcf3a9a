"""`orin-kit chat` as a user has it: on a real pseudo-terminal and in pipes, with a real exported model."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from families import make_model
from orin_kit.chat.display import harmless
from orin_kit.data.chat import Message
from orin_kit.export.export import export
from orin_kit.runtime.generator import Generator
from orin_kit.runtime.runtime import open_runtime
from orin_kit.runtime.sampler import Sampling

DEMO = Path(__file__).parents[2] / "calibration/demo-teacher"
PATIENCE = 60  # seconds after which a test that waits for output gives up
# A session whose controlling terminal is its stdin, so that Ctrl-C is a signal as in any terminal; and one that is not
# ignored, as what a shell starts with & inherits it.
OWN_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
ESCAPES = re.compile(r"\x1b\[[?\d;]*[a-zA-Z]")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random model that never stops by itself, with the demo's template and with one that opens a thought."""
    directory = tmp_path_factory.mktemp("terminal")
    model = make_model("llama3", max_position_embeddings=8192)
    stop_ids = json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"]
    with torch.no_grad():
        model.lm_head.weight[stop_ids] = 0  # type: ignore[index, union-attr, operator]
    paths = {}
    for name in ("plain", "thinking"):
        hf = directory / f"{name}-hf"
        model.save_pretrained(hf)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(DEMO / file, hf / file)
        if name == "thinking":
            template = hf / "chat_template.jinja"
            template.write_text(template.read_text().replace("assistant\\n", "assistant\\n<think>\\n"))
        paths[name] = directory / name
        export(hf, paths[name], max_len=8192, progress=False)
    return SimpleNamespace(**paths)


def arguments(artifact: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "orin_kit", "chat", str(artifact), "--threads", "1", *options]


def environment() -> dict[str, str]:
    dull = {"TERM": "xterm", "INPUTRC": "/dev/null", "PYTHONUTF8": "1"}
    return {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")} | dull


class Reference:
    """What the model says, computed with a fresh cache and without any of the chat's code."""

    def __init__(self, artifact: Path, max_len: int = 1024) -> None:
        self.runtime = open_runtime(artifact, max_len=max_len, threads=1)
        self.tokenizer = self.runtime.tokenizer

    def first_ids(self, question: str, system: str | None = None) -> list[int]:
        chat = [Message("system", system)] if system else []
        return self.tokenizer.encode_chat([*chat, Message("user", question)], reply=True)

    def next_ids(self, ids: list[int], said: list[int], question: str) -> list[int]:
        turn = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return ids + said + self.tokenizer.encode(turn)

    def say(self, ids: list[int], count: int) -> list[int]:
        self.runtime.backend.reset()
        return list(Generator(self.runtime.backend, ()).stream(ids, Sampling(), max_new_tokens=count))

    def shown(self, said: list[int]) -> str:
        return harmless(self.tokenizer.decode(said))


class Terminal:
    """A program on a pseudo-terminal, driven by hand."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *command],
            stdin=slave, stdout=slave, stderr=slave, env=environment(), start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.raw = ""  # all output since the last `until`
        self._bytes = b""

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, pattern: str, patience: float = PATIENCE) -> str:
        """Read until the output since the last call, without escapes, matches; return it."""
        self.raw, self._bytes = "", b""
        ends = time.monotonic() + patience
        while not re.search(pattern, self.text()):
            assert time.monotonic() < ends, f"no {pattern!r} in {self.text()!r}"
            self._read()
        return self.text()

    def ask(self, line: str) -> str:
        """Type a line and return what came until the next prompt, without the echo."""
        self.send(line + "\n")
        return self.until(r"\n> $").removesuffix("> ").partition("\n")[2]

    def interrupt_prompt(self) -> str:
        """Press Ctrl-C until there is an answer: CPython's readline misses a signal just before it begins to wait."""
        for _ in range(PATIENCE // 2):
            self.send("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(r"\n> $", patience=2)
        raise AssertionError("Ctrl-C at the prompt has no effect")

    def text(self) -> str:
        return ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    def leave(self) -> int:
        """The exit code; what was written last is in `raw`."""
        self.raw, self._bytes = "", b""
        ends = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < ends, f"still running: {self.text()!r}"
            self._read()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)

    def _read(self) -> None:
        if select.select([self._master], [], [], 0.2)[0]:
            with contextlib.suppress(OSError):  # EIO: the program has closed its side
                self._bytes += os.read(self._master, 65536)
            self.raw = self._bytes.decode("utf-8", "ignore")


@contextlib.contextmanager
def terminal(command: list[str]) -> Iterator[Terminal]:
    opened = Terminal(command)
    try:
        yield opened
    finally:
        opened.close()


def test_a_conversation(artifacts: SimpleNamespace) -> None:
    reference = Reference(artifacts.plain)
    ids = reference.first_ids("What is 12 x 7?")
    first = reference.say(ids, 40)
    following = reference.next_ids(ids, first, "And again?")
    second = reference.say(following, 40)
    cut = "[answer cut at 40 tokens: --max-new-tokens allows more]\n"
    with terminal(arguments(artifacts.plain, "--max-new-tokens", "40")) as chat:
        assert "context of 1024 tokens. Ctrl-D or /exit leaves, /help lists the commands." in chat.until("> $")
        assert chat.ask("What is 12 x 7?") == f"{reference.shown(first)}\n{cut}"
        # No escape sequence of the model's comes through, only our own dim.
        assert set(ESCAPES.findall(chat.raw)) <= {"\x1b[2m", "\x1b[0m", "\x1b[?2004h", "\x1b[?2004l"}
        assert chat.ask("And again?") == f"{reference.shown(second)}\n{cut}"
        stats = chat.ask("/stats")
        # All of the first prompt and answer but its last token, which was never fed.
        assert f"prompt {len(following)} tokens, {len(ids) + 39} of them reused · answer 40 tokens" in stats
        assert "2 turns · context" in stats and "kv cache" in stats and "TTFT" in stats
        assert chat.ask("/history") == (
            f"> What is 12 x 7?\n{reference.shown(first)}\n> And again?\n{reference.shown(second)}\n"
        )
        assert "the conversation is forgotten" in chat.ask("/reset")
        assert chat.ask("What is 12 x 7?") == f"{reference.shown(first)}\n{cut}"
        assert "forgotten: What is 12 x 7?" in chat.ask("/undo")
        assert "there is no turn to undo" in chat.ask("/undo")
        assert "system message set" in chat.ask("/system Be brief.")
        expected = reference.shown(reference.say(reference.first_ids("Hi", "Be brief."), 40))
        assert chat.ask("Hi") == f"{expected}\n{cut}"
        assert "no system message now" in chat.ask("/system")
        assert chat.ask("/nonsense") == "there is no command /nonsense: /help lists them\n"
        assert "/system TEXT" in chat.ask("/help")
        assert chat.ask("") == ""
        chat.send("\x04")
        assert chat.leave() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(artifacts: SimpleNamespace) -> None:
    reference = Reference(artifacts.plain, max_len=8192)
    options = ("--max-len", "8192", "--max-new-tokens", "7000", "--stats")
    with terminal(arguments(artifacts.plain, *options)) as chat:
        chat.until("> $")
        chat.send("Tell me all.\n")
        chat.until(r"Tell me all\.\n[\s\S]{20}")
        chat.send("\x03")
        end = chat.until(r"\n> $")
        assert "[stopped]\n" in end and "TPOT" in end and "of 8192 tokens" in end
        given = int(re.findall(r"answer (\d+) tokens", chat.ask("/stats"))[0])
        assert 1 <= given < 7000
        # The part that was given stays in the history, marked, and the model goes on from it.
        ids = reference.first_ids("Tell me all.")
        said = reference.say(ids, given)
        assert chat.ask("/history") == f"> Tell me all.\n{reference.shown(said)}  [stopped]\n"
        chat.send("Go on.\n")
        chat.until(r"Go on\.\n[\s\S]{20}")
        chat.send("\x03")
        chat.until(r"\n> $")
        given = int(re.findall(r"answer (\d+) tokens", chat.ask("/stats"))[0])
        expected = reference.shown(reference.say(reference.next_ids(ids, said, "Go on."), given))
        assert f"> Go on.\n{expected}  [stopped]\n" in chat.ask("/history")
        # At the prompt it says how to leave, with or without something typed.
        for typed in ("", "half a mess"):
            chat.send(typed)
            chat.until(re.escape(typed))
            assert "Ctrl-D or /exit leaves" in chat.interrupt_prompt()
        chat.send("/exit\n")
        assert chat.leave() == 0


def test_old_turns_go_and_a_message_too_long_is_an_error_that_the_chat_survives(artifacts: SimpleNamespace) -> None:
    with terminal(arguments(artifacts.plain, "--max-len", "128", "--max-new-tokens", "40")) as chat:
        chat.until("> $")
        assert "forgotten" not in chat.ask("one")
        assert "the context is full: 1 oldest turn forgotten" in "".join(chat.ask(w) for w in ("two", "three"))
        error = chat.ask("7" * 200)
        assert re.match(r"the message makes a prompt of \d+ tokens, and the context holds 128 .*--max-len\n$", error)
        assert "allows more" in chat.ask("four")
        assert "the context of 128 tokens is full" in chat.ask("7" * 100)
        chat.send("\x04")
        assert chat.leave() == 0


def test_a_thought_that_the_template_opened_is_dim_on_a_terminal_and_plain_in_a_pipe(
    artifacts: SimpleNamespace,
) -> None:
    reference = Reference(artifacts.thinking)
    expected = reference.shown(reference.say(reference.first_ids("Hi"), 12))
    with terminal(arguments(artifacts.thinking, "--max-new-tokens", "12", "--prompt", "Hi")) as chat:
        assert chat.leave() == 0
        answer = chat.text().partition("[answer cut")[0]
        assert answer == expected + "\n"
        dim = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", chat.raw, re.S)).replace("\r\n", "\n")
        assert dim.startswith(expected)
    done = piped(artifacts.thinking, "--max-new-tokens", "12", "--prompt", "Hi")
    assert done.stdout == (expected + "\n").encode()


def piped(artifact: Path, *options: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        arguments(artifact, *options),
        input=stdin,
        capture_output=True,
        timeout=PATIENCE,
        env=environment(),
        check=False,
    )


def test_stdin_and_prompt_give_the_answer_and_nothing_else(artifacts: SimpleNamespace) -> None:
    reference = Reference(artifacts.plain)
    expected = reference.shown(reference.say(reference.first_ids("two\nlines é", "Be brief."), 25)) + "\n"
    options = ("--max-new-tokens", "25", "--system", "Be brief.")
    by_pipe = piped(artifacts.plain, *options, stdin="two\nlines é\n".encode())
    by_option = piped(artifacts.plain, *options, "--prompt", "two\nlines é", "--stats")
    for done in (by_pipe, by_option):
        assert done.returncode == 0
        assert done.stdout.decode() == expected
    assert by_pipe.stderr.decode() == "[answer cut at 25 tokens: --max-new-tokens allows more]\n"
    assert re.search(r"TTFT \d+ ms · TPOT [\d.]+ ms · [\d.]+ tok/s · context \d+ of 1024", by_option.stderr.decode())


@pytest.mark.parametrize(
    ("options", "stdin", "said"),
    [
        ((), b" \n", "stdin is empty: write a message"),
        ((), b"caf\xe9", "stdin is not UTF-8 text: send it as UTF-8"),
        (("--prompt", ""), b"", "--prompt is empty"),
        (("--max-len", "64"), b"word " * 100, "and the context holds 64 with the answer: shorten it"),
        (("--prompt", "Hi", "--top-p", "1.5"), b"", "top_p is 1.5: give a number above 0"),
    ],
    ids=["empty", "latin-1", "empty-prompt", "too-long", "top-p"],
)
def test_bad_input_is_one_line_and_exit_code_2(
    artifacts: SimpleNamespace, options: tuple[str, ...], stdin: bytes, said: str
) -> None:
    done = piped(artifacts.plain, *options, stdin=stdin)
    assert done.returncode == 2 and done.stdout == b""
    assert said in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_ctrl_c_ends_a_one_shot_with_130_and_the_answer_so_far(artifacts: SimpleNamespace) -> None:
    reference = Reference(artifacts.plain, max_len=8192)
    options = ("--max-len", "8192", "--max-new-tokens", "7000", "--prompt", "Tell me all.")
    with subprocess.Popen(
        arguments(artifacts.plain, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(20)  # at most
        process.send_signal(signal.SIGINT)
        rest, notes = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert notes.decode() == "[stopped]\n"
    given = (begun + rest).decode().removesuffix("\n")
    whole = reference.shown(reference.say(reference.first_ids("Tell me all."), 300))
    assert given and (given.startswith(whole) or whole.startswith(given.rstrip("\ufffd")))
