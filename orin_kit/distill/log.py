"""The train log: one JSON line a step that is logged, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class TrainLog:
    """Appends to a jsonl file, and to TensorBoard events beside it.

    Args:
        path: the jsonl file; what it holds is gone on from.
        events: directory of the TensorBoard events.
        done: steps of all stages that are done; events of later ones, left by a run that was cut off, are hidden.
    """

    def __init__(self, path: Path, events: Path, done: int) -> None:
        self.path = path
        self._events = SummaryWriter(str(events), purge_step=done + 1 if done else None)

    def write(self, line: dict[str, Any]) -> None:
        """Write one line: `stage`, `step` in it, `done` over all stages, and numbers by name."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, float):
                self._events.add_scalar(name, value, line["done"])

    def close(self) -> None:
        self._events.close()
