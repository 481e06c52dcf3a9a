"""What has been said in a chat, and the prompt that continues it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orin_kit.data.chat import Message
from orin_kit.errors import UserError
from orin_kit.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `stopped` when the user cut the answer short."""

    question: str
    answer: str
    stopped: bool = False


class Conversation:
    """A system message and turns, within a context of `max_len` tokens.

    Args:
        tokenizer: its chat template says how turns become a prompt.
        max_len: tokens that prompt and answer have together.
        room: tokens of the context kept free for an answer, as long as dropping old turns can free them.
        system: the system message, if any; it is never dropped.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, max_len: int, room: int, system: str | None = None) -> None:
        self.tokenizer, self.max_len, self.room = tokenizer, max_len, room
        self.system = system
        self.turns: list[Turn] = []
        self._spoken: list[int] = []  # the last prompt and answer in the very tokens the model saw and chose

    def prompt(self, question: str) -> tuple[list[int], int]:
        """Token ids that ask for the answer to `question`, and how many of the oldest turns they leave out.

        Nothing changes until `add`.

        Raises:
            UserError: the question, even alone, leaves no token for an answer; or the chat template refuses the chat.
        """
        for dropped in range(len(self.turns) + 1):
            ids = self._encode(self.messages(question, dropped))
            if len(ids) + self.room <= self.max_len:
                break
        if len(ids) >= self.max_len:
            what = (
                f"the message makes a prompt of {len(ids)} tokens, and the context holds {self.max_len} with the answer"
            )
            raise UserError(what, mend="shorten it, or start with a larger --max-len")
        return ids, dropped

    def add(self, turn: Turn, *, prompt: Sequence[int], answer: Sequence[int], dropped: int) -> None:
        """Remember a turn with the tokens of its prompt and answer, and forget the `dropped` oldest ones."""
        self.turns = [*self.turns[dropped:], turn]
        self._spoken = [*prompt, *answer]

    def messages(self, question: str, dropped: int = 0) -> list[Message]:
        """The chat up to `question`, without the `dropped` oldest turns."""
        chat = [Message("system", self.system)] if self.system else []
        for turn in self.turns[dropped:]:
            chat += [Message("user", turn.question), Message("assistant", turn.answer)]
        return [*chat, Message("user", question)]

    def _encode(self, chat: list[Message]) -> list[int]:
        """Ids of the chat; what was spoken before keeps its tokens, so that the KV cache still holds them.

        A model may spell a text in other tokens than the tokenizer would.
        """
        text = self.tokenizer.render(chat, reply=True)
        spoken = self.tokenizer.decode(self._spoken, skip_special=False)
        if text.startswith(spoken):
            return self._spoken + self.tokenizer.encode(text[len(spoken) :])
        return self.tokenizer.encode(text)
