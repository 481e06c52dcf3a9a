"""`orin-kit chat`: a conversation in the terminal, or one answer for a pipe."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from threading import Event
from typing import TYPE_CHECKING

from orin_kit.chat.conversation import Conversation, Turn
from orin_kit.chat.display import OPEN, Display, ThoughtSplitter
from orin_kit.errors import OrinKitError, UserError
from orin_kit.runtime.generator import GenerationStats, Generator
from orin_kit.runtime.sampler import Sampling
from orin_kit.tokenizer import TextStream

if TYPE_CHECKING:
    from orin_kit.runtime.runtime import Runtime

PROMPT = "> "
LEAVE = "Ctrl-D or /exit leaves, /help lists the commands"
EXIT_INTERRUPTED = 130
ROOM_SHARE = 4  # a quarter of the context is kept for an answer before old turns are kept
ENDS = {
    "length": "answer cut at {max_new_tokens} tokens: --max-new-tokens allows more",
    "full": "answer cut, the context of {max_len} tokens is full: --max-len allows more",
    "cancelled": "stopped",
}


def chat(
    runtime: Runtime,
    *,
    sampling: Sampling,
    max_new_tokens: int = 512,
    system: str | None = None,
    prompt: str | None = None,
    show_stats: bool = False,
) -> int:
    """Chat with a model in the terminal.

    With `prompt`, or when stdin is not a terminal (all of it is one message), gives one answer on stdout and ends.
    Notices and figures go to stderr.

    Args:
        runtime: an opened artifact of batch 1.
        sampling: how tokens are chosen.
        max_new_tokens: of one answer.
        system: the system message.
        prompt: the one message to answer.
        show_stats: say TTFT, TPOT, rate and context after every answer.

    Returns:
        The exit code: 0, or 130 when Ctrl-C stopped the one answer.

    Raises:
        UserError: the model has no chat template, or the one message is empty, not UTF-8, or longer than the context.
    """
    session = Session(runtime, sampling, max_new_tokens, system, show_stats)
    if prompt is not None:
        return session.answer_once(_message(prompt, "--prompt"))
    if not sys.stdin.isatty():
        return session.answer_once(_message(sys.stdin.buffer.read(), "stdin"))
    session.conversation.prompt("")  # a template that is missing, or has no place for --system, is said at once
    return session.run()


class Session:
    """One chat: its conversation, generator and screen. See `chat`."""

    def __init__(
        self, runtime: Runtime, sampling: Sampling, max_new_tokens: int, system: str | None, show_stats: bool
    ) -> None:
        self.runtime, self.sampling = runtime, sampling
        self.max_new_tokens, self.show_stats = max_new_tokens, show_stats
        self.max_len = runtime.backend.max_len
        room = min(max_new_tokens, self.max_len // ROOM_SHARE)
        self.conversation = Conversation(runtime.tokenizer, max_len=self.max_len, room=room, system=system)
        self.generator = Generator(runtime.backend, runtime.tokenizer.stop_ids)
        self.display = Display()

    def run(self) -> int:
        """The conversation until Ctrl-D or /exit."""
        with contextlib.suppress(ImportError):  # not on Windows: lines are typed without editing and history there
            import readline  # noqa: F401
        name, context = self.runtime.backend.name, f"context of {self.max_len} tokens"
        self.display.note(f"{self.runtime.directory} on {name}, {context}. {LEAVE}.")
        while True:
            try:
                self._handle(_read_line())
            except EOFError:
                return 0
            except KeyboardInterrupt:
                self.display.note(f"\n{LEAVE}")
            except OrinKitError as error:
                self.display.end_answer()
                self.display.note(str(error), style="red")

    def answer_once(self, question: str) -> int:
        """One answer on stdout."""
        self.answer(question)
        return EXIT_INTERRUPTED if self.generator.finish_reason == "cancelled" else 0

    def answer(self, question: str) -> None:
        """Answer on the screen, token by token, until it ends or Ctrl-C; then remember the turn."""
        ids, dropped = self.conversation.prompt(question)
        if dropped:
            self.display.note(f"the context is full: {_count(dropped, 'oldest turn')} forgotten")
        tokenizer = self.runtime.tokenizer
        opened = tokenizer.decode(ids[-8:], skip_special=False).rstrip().endswith(OPEN)
        text, thoughts = TextStream(tokenizer), ThoughtSplitter(thinking=opened)
        said: list[int] = []
        tokens = self.generator.stream(ids, self.sampling, max_new_tokens=self.max_new_tokens)
        with _ctrl_c_sets() as stopped, contextlib.closing(tokens):
            for token in tokens:
                said.append(token)
                self.display.answer(thoughts.push(text.push(token)))
                if stopped.is_set():
                    break
            self.display.answer(thoughts.push(text.close()))
            self.display.answer(thoughts.close())
        self.display.end_answer()
        turn = Turn(question, tokenizer.decode(said), stopped=self.generator.finish_reason == "cancelled")
        self.conversation.add(turn, prompt=ids, answer=said, dropped=dropped)
        self._after_answer()

    def _after_answer(self) -> None:
        end = ENDS.get(str(self.generator.finish_reason))
        if end:
            self.display.note(f"[{end.format(max_new_tokens=self.max_new_tokens, max_len=self.max_len)}]")
        if self.show_stats and self.generator.stats:
            self.display.note(f"{_figures(self.generator.stats)} · {self._context()}")

    def _context(self) -> str:
        return f"context {len(self.generator.cached_ids)} of {self.max_len} tokens"

    def _handle(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if not re.fullmatch(r"/[a-z]*", word):  # /usr/bin is a message
            if word:
                self.answer(_message(line, "the message"))
            return
        if word not in COMMANDS:
            raise UserError(f"there is no command {word}", mend="/help lists them")
        COMMANDS[word][2](self, rest.strip())

    # The commands: each takes what follows its name.

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        self.display.note(
            "the conversation is forgotten" + (", the system message stays" * bool(self.conversation.system))
        )

    def _undo(self, _: str) -> None:
        if not self.conversation.turns:
            raise UserError("there is no turn to undo", mend="ask something first")
        self.display.note(f"forgotten: {self.conversation.turns.pop().question}")

    def _system(self, text: str) -> None:
        before, self.conversation.system = self.conversation.system, text or None
        try:
            self.conversation.prompt("")
        except UserError:
            self.conversation.system = before
            raise
        self.display.note("system message set" if text else "no system message now")

    def _history(self, _: str) -> None:
        if self.conversation.system:
            self.display.note(f"system: {self.conversation.system}")
        for turn in self.conversation.turns:
            self.display.note(f"{PROMPT}{turn.question}\n{turn.answer}" + "  [stopped]" * turn.stopped)

    def _stats(self, _: str) -> None:
        stats, memory = self.generator.stats, self.runtime.backend.memory()
        if stats:
            reused = f"prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} of them reused"
            self.display.note(f"last answer: {_figures(stats)} · {reused} · answer {stats.new_tokens} tokens")
        self.display.note(f"{_count(len(self.conversation.turns), 'turn')} · {self._context()}")
        sizes = ", ".join(f"{kind.replace('_', ' ')} {size / 1e6:.1f} MB" for kind, size in memory.items())
        self.display.note(f"loaded in {self.runtime.load_seconds:.2f} s · {sizes}")

    def _help(self, _: str) -> None:
        for name, (arguments, what, _command) in COMMANDS.items():
            self.display.note(f"{name + ' ' + arguments:<14} {what}")
        self.display.note("Ctrl-C stops an answer, Ctrl-D leaves")

    def _exit(self, _: str) -> None:
        raise EOFError


Command = Callable[[Session, str], None]
COMMANDS: dict[str, tuple[str, str, Command]] = {
    "/help": ("", "this list", Session._help),
    "/reset": ("", "forget the conversation", Session._reset),
    "/undo": ("", "forget the last turn", Session._undo),
    "/history": ("", "what the model is told of the conversation", Session._history),
    "/system": ("TEXT", "set the system message; without TEXT remove it", Session._system),
    "/stats": ("", "times, memory and context", Session._stats),
    "/exit": ("", "leave", Session._exit),
}


@contextlib.contextmanager
def _ctrl_c_sets() -> Iterator[Event]:
    """Within, Ctrl-C sets the event instead of raising: an answer ends between two tokens, never inside a write."""
    stopped = Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _read_line() -> str:
    if sys.stdout.isatty():
        return input(PROMPT)  # by readline, which must know the prompt to draw the line again
    print(PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _message(text: str | bytes, source: str) -> str:
    try:
        # A str from the shell or the terminal has lone surrogates where its bytes were no UTF-8.
        message = (text if isinstance(text, bytes) else text.encode("utf-8")).decode("utf-8").strip()
    except UnicodeError as error:
        raise UserError(f"{source} is not UTF-8 text", mend="send it as UTF-8") from error
    if not message:
        raise UserError(f"{source} is empty", mend="write a message to answer")
    return message


def _figures(stats: GenerationStats) -> str:
    ttft, tpot = stats.ttft_seconds * 1e3, stats.tpot_seconds * 1e3
    later = f" · TPOT {tpot:.1f} ms · {stats.tokens_per_second:.1f} tok/s" if tpot else ""
    return f"TTFT {ttft:.0f} ms{later}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
