"""Training state on disk: one file beside the artifact to be, replaced in one move, so a kill leaves old or new."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from orin_kit.errors import ArtifactError, UserError

STATE, LOG, HEADS, LAYERS, EVENTS = "state.pt", "train.log.jsonl", "heads.json", "layers.json", "tensorboard"


class CheckpointStore:
    """The directory `.NAME.checkpoint` beside the output directory NAME.

    Args:
        out: the artifact the run will write.
        identity: hash of everything that decides the result; a checkpoint of another run is never used.
        answers: hash of everything that decides the teacher's answers, which outlive a change of what follows them.
    """

    def __init__(self, out: Path, identity: str, answers: str = "") -> None:
        self.directory = out.absolute().parent / f".{out.name}.checkpoint"
        self.identity = identity
        names = (STATE, LOG, HEADS, LAYERS, EVENTS)
        self.state, self.log, self.heads, self.layers, self.events = (self.directory / name for name in names)
        # Dear, and there before the first state.
        self.answers = self.directory / f"answers-{answers[:16]}.jsonl"
        self.translations = self.directory / "translations.jsonl"

    def open(self, *, overwrite: bool) -> dict[str, Any] | None:
        """The state to go on from, or None for a fresh start.

        Raises:
            UserError: there is a checkpoint of another recipe or of other models, and `overwrite` is off.
            ArtifactError: the checkpoint cannot be read.
        """
        state = self._read(overwrite) if self.state.is_file() else None
        if state is not None and not overwrite:
            self._check_identity(state)
        elif state is not None and state["identity"] != self.identity:
            state = None
        if state is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for file in self.directory.iterdir():
                if file == self.events:
                    shutil.rmtree(file)
                elif not file.name.startswith(("answers-", "translations")):
                    file.unlink()
        elif self.log.is_file():
            os.truncate(self.log, state["log_bytes"])  # what was logged after the checkpoint is logged again
        return state

    def check(self) -> None:
        """Say before hours are spent that the checkpoint here is another run's.

        Raises:
            UserError: it is.
            ArtifactError: it cannot be read.
        """
        if self.state.is_file():
            self._check_identity(self._read(overwrite=False, mapped=True))

    def read(self) -> dict[str, Any] | None:
        """The state as it is, for a process that is not the first one."""
        return self._read(overwrite=False) if self.state.is_file() else None

    def _check_identity(self, state: dict[str, Any] | None) -> None:
        if state is not None and state["identity"] != self.identity:
            what = f"{self.directory} holds the checkpoint of another recipe, or of other models or data"
            raise UserError(what, mend="run that recipe again to go on with it, or add --overwrite to start anew")

    def _read(self, overwrite: bool, *, mapped: bool = False) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = torch.load(self.state, map_location="cpu", weights_only=True, mmap=mapped)
            _ = state["identity"], state["log_bytes"]
        except Exception as error:  # whatever torch makes of foreign bytes
            if overwrite:
                return None
            what = f"the checkpoint {self.state} cannot be read ({type(error).__name__})"
            raise ArtifactError(what, mend="add --overwrite to start anew") from error
        return state

    def read_layers(self) -> dict[str, Any]:
        """Layers that were matched by search: by field of the recipe."""
        known: dict[str, Any] = json.loads(self.layers.read_text("utf-8")) if self.layers.is_file() else {}
        return known

    def write_layers(self, known: dict[str, Any]) -> None:
        fresh = self.layers.with_suffix(".new")
        fresh.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        fresh.replace(self.layers)

    def save(self, state: dict[str, Any]) -> None:
        """Write `state` (tensors, numbers, text) in place of the last one."""
        fresh = self.state.with_suffix(".new")
        with fresh.open("wb") as file:
            logged = self.log.stat().st_size if self.log.is_file() else 0
            torch.save({**state, "identity": self.identity, "log_bytes": logged}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.state)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
