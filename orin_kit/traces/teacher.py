"""Who answers: a transformers checkpoint or an ONNX artifact, behind one small protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orin_kit.manifest import MANIFEST, ONNX_MODEL, read_manifest
from orin_kit.models.spec import read_spec
from orin_kit.runtime.sampler import Sampling


@dataclass(frozen=True)
class Reply:
    """Tokens of one reply without the stop token, and whether there was one."""

    ids: list[int]
    finished: bool


class Teacher(Protocol):
    """Answers prompts in batches.

    Implementations: `transformers_teacher.py` (torch), `onnx_teacher.py` (a runtime backend).
    """

    def reply(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], max_new_tokens: int
    ) -> list[Reply]:
        """Sampled replies; the same arguments give the same replies.

        Args:
            prompts: token ids of any lengths, shorter than the context.
            sampling: how tokens are chosen; its own `seed` is not used.
            seeds: one a prompt.
            max_new_tokens: of a reply, its stop token included; the end of the context cuts it, too.
        """
        ...


def is_onnx(directory: Path) -> bool:
    """Whether it is (or was meant as) an ONNX artifact; else a transformers checkpoint is expected."""
    if (directory / MANIFEST).is_file():
        return read_manifest(directory).kind == "onnx"
    return (directory / ONNX_MODEL).is_file()


def context_of(directory: Path) -> int:
    """The most tokens, prompt and reply, that the teacher can hold.

    Raises:
        ArtifactError: the directory is neither a checkpoint nor a whole ONNX artifact.
        UnsupportedModelError: a family that orin-kit does not know.
    """
    if is_onnx(directory):
        return int(read_manifest(directory, "onnx").settings["max_len"])
    return read_spec(directory).max_position_embeddings


def open_teacher(directory: Path, *, room: int, batch_size: int, threads: int | None, provider: str) -> Teacher:
    """Load a teacher.

    Args:
        directory: an ONNX artifact of ours, or a checkpoint that transformers loads.
        room: tokens, prompt and reply, that it has to hold; the context is the limit anyway.
        batch_size: the most prompts at once.
        threads: CPU threads; all the process may use when None.
        provider: "cpu" or "cuda", of onnxruntime; transformers takes the GPU when there is one.

    Raises:
        ArtifactError: a file is missing or damaged.
        UnsupportedModelError: a family that orin-kit does not know, or a checkpoint whose weights are packed.
        UserError: the provider is not there.
    """
    if is_onnx(directory):
        from orin_kit.traces.onnx_teacher import OnnxTeacher

        length = min(room, context_of(directory))
        return OnnxTeacher(directory, max_len=length, batch_size=batch_size, threads=threads, provider=provider)
    from orin_kit.traces.transformers_teacher import TransformersTeacher  # torch takes seconds to import

    return TransformersTeacher(directory, threads=threads)
