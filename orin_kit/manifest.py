"""Artifact directories: every verb reads directories and writes one, whole or not at all.

An artifact is a directory in its ecosystem's own format with an `orin_kit.json` manifest beside the files. It is
written to a temporary sibling (`.NAME.partial-PID`) and renamed when complete, so a kill never leaves a half-written
directory under the final name, and the manifest, written last, lists every file with its size and sha256.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from orin_kit.errors import ArtifactError, UserError

MANIFEST = "orin_kit.json"
FORMAT = 1
ONNX_MODEL, ONNX_DATA = "model.onnx", "model.onnx.data"  # the graph of an `onnx` artifact, and its weights
KINDS = ("model", "int4", "onnx", "engine", "profile", "demo", "logits", "traces")
# What identifies a model directory that somebody else made.
INPUT_PATTERNS = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "*.onnx", "*.onnx.data",
)  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """What `orin_kit.json` says.

    Attributes:
        kind: one of `KINDS`.
        made_by: program and version.
        created: ISO 8601, UTC.
        settings: the verb's options, enough to run it again.
        inputs: for each input its path and sha256.
        files: for each file of the artifact its `bytes` and `sha256`.
        results: what was measured while making it.
    """

    kind: str
    made_by: str
    created: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


@dataclass
class ArtifactWriter:
    """An artifact being written: put files into `directory`, figures into `results`."""

    directory: Path
    results: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def write_artifact(
    directory: str | Path,
    kind: str,
    *,
    inputs: Mapping[str, str | Path],
    settings: Mapping[str, Any],
    overwrite: bool = False,
) -> Iterator[ArtifactWriter]:
    """Write an artifact atomically.

    Args:
        directory: the final name; must not exist unless `overwrite`.
        kind: one of `KINDS`.
        inputs: what it is made from, by role (`{"student": "student/"}`); directories or files, hashed here.
        settings: JSON-able options.
        overwrite: replace an existing artifact, in the moment the new one is complete.

    Raises:
        UserError: `directory` exists, its parent cannot be written to, or the disk is full.
    """
    final = Path(directory).absolute()
    _clean_up_after_kills(final)
    check_free(final, overwrite=overwrite)
    partial = final.parent / f".{final.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    writer = ArtifactWriter(partial)
    try:
        yield writer
        _write_manifest(writer, kind, inputs, settings)
        _put_in_place(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _says_disk_full(error):
            raise UserError(f"the disk of {final} is full", mend="make room and run the command again") from error
        raise


def check_free(directory: str | Path, *, overwrite: bool) -> None:
    """Say now, before minutes are spent, that `directory` cannot be written.

    Raises:
        UserError: it exists and `overwrite` is off, it is not one of ours, or its parent is not writable.
    """
    final = Path(directory).absolute()
    if final.exists():
        ours = final.is_dir() and ((final / MANIFEST).is_file() or not any(final.iterdir()))
        if not ours:
            raise UserError(f"{final} exists and is not an orin-kit artifact", mend="choose another --out")
        if not overwrite and any(final.iterdir()):
            raise UserError(f"{final} exists", mend="choose another --out or add --overwrite")
    parent = next(p for p in final.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written to", mend="choose an --out in a folder of yours")


def read_manifest(directory: str | Path, *kinds: str, verify: bool = False) -> Manifest:
    """Read the manifest of a complete artifact.

    Args:
        directory: the artifact.
        kinds: the kinds the caller can use; any when none is given.
        verify: also compare every file's sha256 (sizes are always compared).

    Raises:
        ArtifactError: no such directory, no manifest, another kind, a newer format, or a file missing, cut or changed.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    wanted = " or ".join(kinds) or "orin-kit"
    if not directory.is_dir():
        raise ArtifactError(f"no such directory: {directory}", mend=f"give the path of an {wanted} artifact")
    if not path.is_file():
        mend = f"give a directory that orin-kit wrote ({wanted})"
        raise ArtifactError(f"{directory} has no {MANIFEST}, so it is no {wanted} artifact", mend=mend)
    try:
        manifest = Manifest(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", mend="make the artifact again") from error
    if manifest.format > FORMAT:
        raise ArtifactError(f"{path} has format {manifest.format}, newer than {FORMAT}", mend="update orin-kit")
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(
            f"{directory} is a {manifest.kind} artifact, not {wanted}", mend=f"give a {wanted} artifact"
        )
    for name, entry in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise ArtifactError(f"{directory} lacks its file {name}", mend="copy it whole or make it again")
        if file.stat().st_size != entry["bytes"]:
            what = f"{file} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}"
            raise ArtifactError(what, mend="copy it whole or make it again")
        if verify and sha256_file(file) != entry["sha256"]:
            raise ArtifactError(f"{file} is not what its manifest says (sha256 differs)", mend="make it again")
    return manifest


def made_by() -> str:
    """This program and its version, as it signs manifests and reports."""
    return f"orin-kit {metadata.version('orin-kit')}"


def sha256_file(path: str | Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_input(path: str | Path) -> str:
    """One sha256 for an input: of the file, of an artifact's manifest, or over a foreign model directory's files."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if (path / MANIFEST).is_file():
        return sha256_file(path / MANIFEST)
    digest = hashlib.sha256()
    for file in sorted({f for pattern in INPUT_PATTERNS for f in path.glob(pattern)}):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _write_manifest(
    writer: ArtifactWriter, kind: str, inputs: Mapping[str, str | Path], settings: Mapping[str, Any]
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    files = {}
    for file in sorted(p for p in writer.directory.rglob("*") if p.is_file()):
        entry = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        files[file.relative_to(writer.directory).as_posix()] = entry
    manifest = Manifest(
        kind=kind,
        made_by=made_by(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings=dict(settings),
        inputs={role: {"path": str(path), "sha256": sha256_input(path)} for role, path in inputs.items()},
        files=files,
        results=writer.results,
    )
    path = writer.directory / MANIFEST
    with path.open("w", encoding="utf-8") as stream:
        json.dump(asdict(manifest), stream, indent=2, default=str)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _says_disk_full(error: BaseException) -> bool:
    """Few libraries keep the error's number: safetensors wraps it in text, numpy counts what it could not write."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    return any(sign in str(error) for sign in ("No space left on device", " requested and "))


def _put_in_place(partial: Path, final: Path) -> None:
    if not final.exists():
        partial.rename(final)
        return
    old = final.parent / f".{final.name}.old-{os.getpid()}"
    final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _clean_up_after_kills(final: Path) -> None:
    """Remove what killed runs left beside `final`; put back an artifact caught in the middle of being replaced."""
    for kind in ("old", "partial"):
        for left in final.parent.glob(f".{final.name}.{kind}-*"):
            pid = left.name.rpartition("-")[2]
            if pid.isdigit() and psutil.pid_exists(int(pid)):
                continue
            if kind == "old" and not final.exists():
                left.rename(final)
            else:
                shutil.rmtree(left, ignore_errors=True)
