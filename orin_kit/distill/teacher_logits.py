"""The offline teacher: its k likeliest tokens at every asked position, written once and read row by row.

A shard holds whole rows and needs nothing else to be read:

| tensor | type | what |
|---|---|---|
| `keys` | uint8 `[rows, 16]` | `row_key` of each row |
| `starts` | int64 `[rows + 1]` | where a row's positions begin; it ends where the next one begins |
| `ids` | int32 `[positions, k]` | the k likeliest tokens |
| `logits` | fp16 `[positions, k]` | theirs, descending, relative to the position's largest, which is 0 |
| `tails` | fp32 `[positions, temperatures]` | log of the summed exp(logit / T) of all others, relative to it too |

A softmax does not see the shift, and near 0 fp16 is exact to 1e-3 and better where the probabilities are. A position
takes 6 k + 4 temperatures bytes: 412 at k = 64 and seven temperatures, so 13 million assistant tokens are 5.4 GB,
where all 151,936 logits in fp16 would be 4 TB.

A row is found by what it contains, so any order, seed or batch size of training finds it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from orin_kit.data.packing import IGNORE, Example, collate
from orin_kit.distill.dataset import in_batches
from orin_kit.distill.logits import Dense, TopK, top_k
from orin_kit.distill.recipe import Temperature
from orin_kit.distill.signals import Signal, Teacher, TensorBatch, Wants
from orin_kit.errors import ArtifactError, UserError
from orin_kit.manifest import read_manifest

KIND = "logits"
SHARD = "logits-{:05d}.safetensors"
SHARD_BYTES = 1 << 30  # one shard is in memory while it is written
KEY_BYTES = 16
TEMPERATURES = 7
LOWEST = float(np.finfo(np.float16).min)
STORED = ("ids", "logits", "tails")
AGAIN = "run orin-kit cache again with this recipe"


def default_temperatures(schedule: Temperature) -> tuple[float, ...]:
    """Temperatures that enclose a schedule's, ascending, each the same multiple of the one before.

    Between two of them a tail is interpolated. Seven from 1 to 2 put the tail's logarithm at most 0.008 too high, and
    the forward KL off by 0.014 % (k = 64, the demo teacher) to 0.4 % (random logits over 151,936 tokens, where nearly
    all the mass is in the tail).
    """
    highest = max(schedule.start, schedule.floor)
    lowest = highest if schedule.factor == 1.0 else schedule.floor
    return tuple(dict.fromkeys(np.geomspace(lowest, highest, TEMPERATURES).tolist()))


def row_key(row: Example) -> bytes:
    """What a row is found by: a hash of its tokens, of which of them are trained, and of its chats' lengths."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in (row.ids, row.trained, row.lengths or (len(row.ids),)):
        digest.update(np.asarray([len(part), *part], "<i8").tobytes())
    return digest.digest()


def asked_positions(row: Example) -> int:
    """How many of a row's positions are asked for the next token."""
    return int((collate([row], pad_id=0).labels != IGNORE).sum())


def vocabulary_digest(directory: Path) -> str:
    """Hash of a tokenizer's ids and what they mean."""
    vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(with_added_tokens=True)
    return hashlib.sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


def write_logits(
    teacher: Teacher,
    rows: Sequence[Example],
    directory: Path,
    *,
    k: int,
    temperatures: Sequence[float],
    batch_size: int,
    device: torch.device,
    vocab_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write the teacher's top-k logits of all rows as shards; a shard of the same rows that is there is not made again.

    A shard appears under its name when it is whole, and no batch reaches over its end: what a run that was killed and
    started again writes is the same, byte for byte.

    Args:
        teacher: gives `Dense` logits.
        rows: to train on; equal ones are stored once.
        directory: exists; holds nothing, or shards of an earlier run of the same teacher, k and temperatures.
        k: at most `vocab_size`.
        temperatures: at which the tails are recorded.
        batch_size: rows that go through the teacher together.
        device: the teacher's.
        vocab_size: the tokenizer's: tokens beyond it only pad the teacher's vocabulary and are left out.
        shard_bytes: no shard is larger, unless one row is.
        advance: told how many rows were done, for a progress bar.

    Returns:
        The shards, in order.

    Raises:
        UserError: k or a temperature that cannot be, or logits that are not finite.
    """
    ascending, paths = sorted(set(temperatures)), []
    distinct = {row_key(row): row for row in rows}
    for number, part in enumerate(_shards(distinct, position_bytes(k, len(ascending)), shard_bytes), start=1):
        paths.append(path := directory / SHARD.format(number))
        if _holds(path, part):
            advance(len(part))
            continue
        tensors = _empty_shard(part, k, len(ascending))
        done = 0
        for batch in in_batches(list(part.values()), batch_size, device):
            found = _stored_form(_ask(teacher, batch, vocab_size), k, ascending)
            there = slice(done, done := done + batch.labels.numel())
            for name, values in found.items():
                tensors[name][there] = values
            advance(len(batch.rows))
        _save(path, tensors)
    return paths


def position_bytes(k: int, temperatures: int) -> int:
    """What one asked position takes on disk."""
    return 6 * k + 4 * temperatures


def _shards(rows: Mapping[bytes, Example], width: int, limit: int) -> Iterator[dict[bytes, Example]]:
    """Rows in order, cut where a shard would grow beyond `limit` bytes."""
    shard: dict[bytes, Example] = {}
    size = 0
    for key, row in rows.items():
        added = asked_positions(row) * width + KEY_BYTES + 8
        if shard and size + added > limit:
            yield shard
            shard, size = {}, 0
        shard[key] = row
        size += added
    if shard:
        yield shard


def _empty_shard(rows: Mapping[bytes, Example], k: int, temperatures: int) -> dict[str, NDArray[Any]]:
    starts = np.cumsum([0, *map(asked_positions, rows.values())], dtype=np.int64)
    positions = int(starts[-1])
    return {
        "keys": np.frombuffer(b"".join(rows), np.uint8).reshape(-1, KEY_BYTES),
        "starts": starts,
        "ids": np.empty((positions, k), np.int32),
        "logits": np.empty((positions, k), np.float16),
        "tails": np.empty((positions, temperatures), np.float32),
    }


def _holds(path: Path, rows: Mapping[bytes, Example]) -> bool:
    """Whether a whole shard of just these rows is there."""
    try:
        shard: Any = safe_open(path, framework="np")
        return bool(shard.get_tensor("keys").tobytes() == b"".join(rows))
    except (SafetensorError, OSError):
        return False


@torch.no_grad()
def _ask(teacher: Teacher, batch: TensorBatch, vocab_size: int | None) -> Dense:
    dense = teacher(batch, Wants(logits=True)).logits
    assert isinstance(dense, Dense)
    return Dense(dense.hidden, dense.weight[:vocab_size], None if dense.bias is None else dense.bias[:vocab_size])


def _stored_form(dense: Dense, k: int, temperatures: Sequence[float]) -> dict[str, NDArray[Any]]:
    """The tensors of a shard for some positions.

    Raises:
        UserError: a logit is not a number.
    """
    found = top_k(dense, k, temperatures)
    largest = found.logits[:, :1]
    if not bool(torch.isfinite(largest).all()):  # infinities and NaN are sorted first
        what = "the teacher's logits are not finite"
        raise UserError(what, mend="try precision: bf16 or fp32; if it is so already, the teacher is damaged")
    relative = (found.logits - largest).clamp(min=LOWEST)
    tails = found.tails - largest / largest.new_tensor(found.temperatures)
    return {
        "ids": found.ids.to(torch.int32).cpu().numpy(),
        "logits": relative.half().cpu().numpy(),
        "tails": tails.float().cpu().numpy(),
    }


def _save(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh)
    with fresh.open("rb") as stream:
        os.fsync(stream.fileno())
    fresh.replace(path)


# --- reading ---------------------------------------------------------------------------------------------------------


class StoredTeacher:
    """A `logits` artifact as a teacher: of the mapped files, only the rows of a batch are read.

    Args:
        directory: what `orin-kit cache` wrote.
        tokenizer: directory of the tokenizer that training uses.
        temperature: the schedule that training follows; None when no divergence is taken.

    Attributes:
        temperatures: at which the tails are recorded, ascending.
        rows: how many are stored.

    Raises:
        ArtifactError: no such artifact, not whole, or damaged.
        UserError: it is of another tokenizer, or not of these temperatures.
    """

    def __init__(self, directory: Path, *, tokenizer: Path, temperature: Temperature | None = None) -> None:
        manifest = read_manifest(directory, KIND)
        self.directory = directory
        self.temperatures: tuple[float, ...] = tuple(manifest.settings["temperatures"])
        if manifest.settings["vocabulary"] != vocabulary_digest(tokenizer):
            what = f"{directory} was written by a teacher with another tokenizer than {tokenizer}'s"
            raise UserError(what, mend=AGAIN)
        self._check_temperatures(temperature)
        self._nothing = _empty_shard({}, manifest.settings["k"], len(self.temperatures))
        self._shards: list[dict[str, Any]] = []
        self._places: dict[bytes, tuple[int, slice]] = {}  # row key -> number of its shard, its positions there
        for name in sorted(manifest.files):
            if Path(name).match("logits-*.safetensors"):
                self._add(directory / name)

    @property
    def rows(self) -> int:
        return len(self._places)

    def check(self, rows: Iterable[Example]) -> None:
        """Say before training, not in the middle of it, that a row is not stored.

        Raises:
            UserError: it is not.
        """
        for row in rows:
            self._find(row)

    def __call__(self, batch: TensorBatch, wants: Wants) -> Signal:
        """The logits of a batch's asked positions, on its device: `ids` int64, `logits` and `tails` fp32.

        Raises:
            UserError: more than logits is wanted, or a row is not stored.
        """
        if wants.hidden or wants.attention or wants.embeddings:
            what = f"{self.directory} holds logits alone, no hidden states, attention or embeddings"
            raise UserError(what, mend="set stages.features and stages.attention to null, or teacher_logits to null")
        if not wants.logits:
            return Signal()
        places = [self._find(row) for row in batch.rows]
        ids, logits, tails = (torch.from_numpy(self._read(name, places)) for name in STORED)
        if len(ids) != batch.labels.numel():
            what = f"{self.directory} has {len(ids)} positions for {batch.labels.numel()} asked ones"
            raise ArtifactError(what, mend=AGAIN)
        device = batch.labels.device
        stored = TopK(
            ids.to(device, torch.int64), logits.to(device).float(), tails.to(device), temperatures=self.temperatures
        )
        return Signal(logits=stored)

    def _read(self, name: str, places: Sequence[tuple[int, slice]]) -> NDArray[Any]:
        # safetensors refuses an empty slice at a tensor's end.
        parts = [self._shards[shard][name][there] for shard, there in places if there.start < there.stop]
        return np.concatenate([self._nothing[name], *parts])

    def _find(self, row: Example) -> tuple[int, slice]:
        place = self._places.get(row_key(row))
        if place is None:
            what = f"{self.directory} does not know a row: data, seed or tokenizer are not those it was written with"
            raise UserError(what, mend=AGAIN)
        return place

    def _add(self, file: Path) -> None:
        try:
            opened: Any = safe_open(file, framework="np")
            keys, starts = opened.get_tensor("keys"), opened.get_tensor("starts").tolist()
            shard = {name: opened.get_slice(name) for name in STORED}
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} cannot be read: {error}", mend="copy it again, whole") from error
        for key, start, stop in zip(keys, starts[:-1], starts[1:], strict=True):
            self._places[key.tobytes()] = len(self._shards), slice(start, stop)
        self._shards.append(shard)

    def _check_temperatures(self, schedule: Temperature | None) -> None:
        if schedule is None:
            return
        passed, known = default_temperatures(schedule), self.temperatures
        slack = 1e-6
        if passed[0] < known[0] * (1 - slack) or passed[-1] > known[-1] * (1 + slack):
            what = (
                f"{self.directory} is stored for temperatures {known[0]:g} to {known[-1]:g},"
                f" the recipe goes from {passed[-1]:g} to {passed[0]:g}"
            )
            raise UserError(what, mend=AGAIN)
