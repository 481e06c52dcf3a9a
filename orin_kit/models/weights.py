"""Weights of a model directory, read one tensor at a time from its (sharded) safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from orin_kit.errors import ArtifactError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# https://github.com/huggingface/safetensors#format
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
MEND = "copy the file again, whole"


class WeightSource:
    """Named tensors on disk; each `get` is a view of mapped memory, so a model larger than memory can be walked.

    Safetensors' numpy loader has no bfloat16, hence the header is read here and the data mapped.

    Args:
        directory: where the files lie.
        single: what the file is called when there is one; shards are found by their index.

    Raises:
        ArtifactError: no weights, a shard missing, a file cut short or with a broken header.
    """

    def __init__(self, directory: str | Path, single: str = SINGLE) -> None:
        self.directory = Path(directory)
        self._where: dict[str, tuple[Path, int, dict[str, Any]]] = {}  # name -> file, start of data, header entry
        for file in _files(self.directory, single):
            header, start = _header(file)
            for name, entry in header.items():
                self._where[name] = (file, start, entry)

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)[2]["shape"])

    def get(self, name: str) -> NDArray[Any]:
        """The tensor in its stored dtype (bfloat16 through ml_dtypes), read-only.

        Raises:
            ArtifactError: there is no such tensor.
        """
        file, start, entry = self._entry(name)
        begin, end = entry["data_offsets"]
        if begin == end:
            return np.empty(entry["shape"], DTYPES[entry["dtype"]])
        # A map of its own: once the tensor is let go, its pages no longer count as ours.
        raw = np.memmap(file, np.uint8, mode="r", offset=start + begin, shape=(end - begin,))
        tensor: NDArray[Any] = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return tensor

    def float32(self, name: str) -> NDArray[np.float32]:
        """The tensor as fp32, a fresh array unless it is stored so."""
        return np.asarray(self.get(name), dtype=np.float32)

    def _entry(self, name: str) -> tuple[Path, int, dict[str, Any]]:
        if name not in self._where:
            what = f"{self.directory} has no tensor {name}"
            raise ArtifactError(what, mend="the weights do not belong to this config.json; get both from one model")
        return self._where[name]


def has_weights(directory: str | Path) -> bool:
    """Whether a model directory holds weights at all (a directory with a config alone is a model to be born)."""
    return any((Path(directory) / name).is_file() for name in (SINGLE, INDEX))


def _files(directory: Path, single: str) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        if not (directory / single).is_file():
            mend = "orin-kit reads safetensors only; convert .bin checkpoints with transformers' save_pretrained"
            raise ArtifactError(f"no {single} or {INDEX} in {directory}", mend=mend)
        return [directory / single]
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{index} cannot be read: {error}", mend=MEND) from error
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ArtifactError(f"{directory} lacks its shard {name}", mend="copy all the model's files")
    return [directory / name for name in names]


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's tensors, and where its data starts."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ArtifactError(f"{file} is cut short or no safetensors file ({size} bytes)", mend=MEND)
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                _check_entry(name, entry, size - 8 - length, file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{file} has a broken header: {error}", mend=MEND) from error
    return header, 8 + length


def _check_entry(name: str, entry: dict[str, Any], available: int, file: Path) -> None:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ArtifactError(f"{file}: {name} has dtype {entry['dtype']}", mend=f"known: {', '.join(DTYPES)}")
    if end > available:
        what = f"{file} is cut short: {name} ends at byte {end} of {available}"
        raise ArtifactError(what, mend=MEND)
    items = int(np.prod(entry["shape"], dtype=np.int64))
    if begin < 0 or end - begin != items * np.dtype(DTYPES[entry["dtype"]]).itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for shape {entry['shape']}")
