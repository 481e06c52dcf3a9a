"""Replies on disk as they come, beside the artifact to be: a killed run goes on from its last batch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from orin_kit.errors import ArtifactError, UserError
from orin_kit.traces.teacher import Reply


class AnswerStore:
    """The file `.NAME.answers.jsonl` beside the output directory NAME.

    Its first line holds the identity, each further one a batch: `{"batch": 0, "replies": [[ids, finished], ...]}`.

    Args:
        out: the artifact the run will write.
        identity: hash of everything that decides the replies; those of another run are never used.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.path = out.absolute().parent / f".{out.name}.answers.jsonl"
        self.identity = identity

    def open(self, *, overwrite: bool) -> dict[int, list[Reply]]:
        """The batches that are there; a last line that a kill left half written is cut off.

        Raises:
            UserError: they are another run's, and `overwrite` is off.
            ArtifactError: the file cannot be read, and `overwrite` is off.
        """
        if self.path.is_file():
            data = self.path.read_bytes()
            first, *lines = data[: data.rfind(b"\n") + 1].splitlines() or [b""]
            try:
                if not first or json.loads(first)["identity"] == self.identity:
                    batches = {
                        row["batch"]: [Reply(*reply) for reply in row["replies"]] for row in map(json.loads, lines)
                    }
                    if first:
                        os.truncate(self.path, data.rfind(b"\n") + 1)
                        return batches
                elif not overwrite:
                    what = f"{self.path} holds answers that were made with other settings, questions or teacher"
                    raise UserError(
                        what, mend="run that command again to go on with it, or add --overwrite to start anew"
                    )
            except (ValueError, KeyError, TypeError) as error:
                if not overwrite:
                    what = f"the answers in {self.path} cannot be read: {error}"
                    raise ArtifactError(what, mend="add --overwrite to start anew") from error
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"identity": self.identity}) + "\n")
        return {}

    def append(self, batch: int, replies: Sequence[Reply]) -> None:
        """Keep a batch. On disk when this returns."""
        row = {"batch": batch, "replies": [[reply.ids, reply.finished] for reply in replies]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
