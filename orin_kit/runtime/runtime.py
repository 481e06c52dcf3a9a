"""Runtime: an artifact opened for use, whatever the backend."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from orin_kit.errors import UserError
from orin_kit.manifest import Manifest, read_manifest
from orin_kit.models.spec import read_spec
from orin_kit.runtime.backend import Backend
from orin_kit.runtime.lora import load_adapter
from orin_kit.tokenizer import ChatTokenizer

DEFAULT_MAX_LEN = 1024


@dataclass(frozen=True)
class Runtime:
    """A loaded artifact.

    Attributes:
        directory: where it lies.
        manifest: its manifest.
        backend: the decoder; `backend.max_len` bounds prompt and answer together.
        tokenizer: text to ids and back.
        load_seconds: the time it took to open.
    """

    directory: Path
    manifest: Manifest
    backend: Backend
    tokenizer: ChatTokenizer
    load_seconds: float

    def set_adapter(self, directory: str | Path | None) -> None:
        """Use the LoRA adapter that PEFT saved in a directory from here on, or none; empties the cache.

        Raises:
            ArtifactError: the adapter is broken or belongs to another model.
            UnsupportedModelError: it is more than plain LoRA.
            UserError: it changes linears that were not among `--lora-targets` at export.
        """
        self.backend.set_adapter(None if directory is None else load_adapter(directory, read_spec(self.directory)))


def open_runtime(
    directory: str | Path,
    *,
    max_len: int | None = None,
    batch_size: int = 1,
    threads: int | None = None,
    provider: str = "cpu",
    adapter: str | Path | None = None,
) -> Runtime:
    """Open an ONNX artifact, or an engine on the machine that built it.

    Args:
        directory: what `orin-kit export` or `orin-kit build-engine` wrote.
        max_len: tokens a row of the cache can hold; `DEFAULT_MAX_LEN`, or the artifact's own limit if that is less.
        batch_size: rows of the cache.
        threads: CPU threads of onnxruntime; all the process may use when None.
        provider: of onnxruntime, "cpu" or "cuda"; an engine runs on the GPU.
        adapter: a LoRA adapter to begin with; see `Runtime.set_adapter`.

    Raises:
        ArtifactError: the directory is not a whole artifact of these kinds, or an engine of another machine.
        UserError: `max_len` is longer than the artifact allows, or the provider cannot run it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, "onnx", "engine")
    limit = int(manifest.settings["max_len"])
    if max_len is not None and not 1 <= max_len <= limit:
        what = f"--max-len {max_len} is not between 1 and {limit}, the longest context of {directory}"
        raise UserError(what, mend=f"lower it, or export again with --max-len {max_len}")
    started = time.perf_counter()
    tokenizer = ChatTokenizer(directory)
    max_len = max_len or min(DEFAULT_MAX_LEN, limit)
    backend: Backend
    # Backends take a while to import, and each needs packages of its own.
    if manifest.kind == "engine":
        from orin_kit.runtime.backends.tensorrt_engine import open_engine

        backend = open_engine(directory, manifest, max_len=max_len, batch_size=batch_size)
    else:
        from orin_kit.runtime.backends.onnx import OnnxBackend

        backend = OnnxBackend(directory, max_len=max_len, batch_size=batch_size, threads=threads, provider=provider)
    runtime = Runtime(directory, manifest, backend, tokenizer, time.perf_counter() - started)
    if adapter is not None:
        runtime.set_adapter(adapter)
    return runtime
