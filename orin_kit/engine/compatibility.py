"""Which TensorRT, which GPU and which plugin library a graph can be built with, and an engine run with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orin_kit.errors import ArtifactError, UserError
from orin_kit.manifest import sha256_file

Version = tuple[int, ...]
OLDEST: Version = (10, 3)  # JetPack 6.2; IPluginV3 with aliased outputs, strongly typed networks
NEXT_MAJOR: Version = (12,)
PARSER_KNOWS_CACHE: Version = (11, 0)  # TRT_KVCacheUpdate in ONNX files
NETWORK_KNOWS_CACHE: Version = (10, 15)  # IKVCacheUpdateLayer, by the network API
DIALECTS = {"plugin": "trt_plugin", "native": "trt_native"}  # --kv -> the exporter's dialect
JETPACKS = {"6.2": "10.3", "7.2": "10.16"}
ORIN_SM = 87
# Ways a cache is written, as manifests and plans say them.
PLUGIN, SELECT, PARSED, NETWORK = "plugin", "select", "layer, by the parser", "layer, by the network API"
IN_PLACE = (PLUGIN, PARSED, NETWORK)


@dataclass(frozen=True)
class Machine:
    """What an engine is built or run on.

    Attributes:
        tensorrt: its version, "10.3.0".
        sm: the GPU's compute capability, 87.
        gpu: its name.
    """

    tensorrt: str
    sm: int
    gpu: str


def parse_version(text: str) -> Version:
    """The leading numbers of a version: "10.16.1.11" -> (10, 16, 1, 11).

    Raises:
        UserError: there are none.
    """
    found = re.match(r"\d+(\.\d+)*", text)
    if found is None:
        raise UserError(f"{text!r} is no version", mend="give one like 10.3 or 10.16.1")
    return tuple(int(part) for part in found[0].split("."))


def cache_writing(kv: str, dialect: str, kv_update: str, kv_bits: int, tensorrt: str, source: Path | str) -> str:
    """How an engine of a graph writes its cache: `PLUGIN`, `SELECT`, `PARSED` or `NETWORK`.

    Args:
        kv: what was asked for, a key of `DIALECTS`.
        dialect: of the graph, by its manifest.
        kv_update: of the graph, by its manifest.
        kv_bits: of the graph's cache.
        tensorrt: version that builds.
        source: the graph's directory, for messages.

    Raises:
        UserError: this TensorRT cannot build it, or the graph is of another dialect; the message says what can.
    """
    version = parse_version(tensorrt)
    if not OLDEST <= version < NEXT_MAJOR:
        what = f"TensorRT {tensorrt} is not supported"
        raise UserError(what, mend="use 10.3 (JetPack 6.2), 10.16 (JetPack 7.2) or another one below 12")
    if kv not in DIALECTS:
        raise UserError(f"--kv {kv} is not known", mend=f"use one of {', '.join(DIALECTS)}")
    if dialect != DIALECTS[kv]:
        other = next((name for name, value in DIALECTS.items() if value == dialect), None)
        mend = f"export it with --dialect {DIALECTS[kv]}" + (f", or build with --kv {other}" if other else "")
        raise UserError(f"{source} was exported in the {dialect} dialect, --kv {kv} takes {DIALECTS[kv]}", mend=mend)
    if kv == "plugin":
        return PLUGIN
    if kv_update == "layer":
        if version < PARSER_KNOWS_CACHE:
            what = (
                f"{source} writes its cache by TRT_KVCacheUpdate, which TensorRT {tensorrt} does not parse (11.0 does)"
            )
            raise UserError(what, mend="export with --kv-update select, or use --kv plugin")
        return PARSED
    if version >= NETWORK_KNOWS_CACHE and kv_bits == 16:
        return NETWORK
    return SELECT


def check_engine(directory: Path, settings: dict[str, Any], machine: Machine) -> None:
    """Say that an engine cannot run here, before it is opened.

    Raises:
        ArtifactError: it was built for another GPU or TensorRT, or its plugin library is another file than it was.
    """
    again = "build it again on this machine with orin-kit build-engine"
    if int(settings["sm"]) != machine.sm:
        what = f"{directory} was built for sm_{settings['sm']} ({settings['gpu']}), this GPU is sm_{machine.sm}"
        raise ArtifactError(f"{what} ({machine.gpu})", mend=again)
    if str(settings["tensorrt"]) != machine.tensorrt:
        what = f"{directory} was built with TensorRT {settings['tensorrt']}, this is {machine.tensorrt}"
        raise ArtifactError(what, mend=again)
    if settings.get("dialect") not in DIALECTS.values():
        raise ArtifactError(f"{directory} is of dialect {settings.get('dialect')!r}", mend="update orin-kit")
    library = settings.get("plugin_library")
    if settings["dialect"] == "trt_plugin" and not library:
        raise ArtifactError(f"{directory} names no plugin library, which its dialect needs", mend=again)
    if library:
        path = directory / library["name"]
        if not path.is_file():
            raise ArtifactError(f"{directory} lacks its plugin library {library['name']}", mend="copy it whole")
        if sha256_file(path) != library["sha256"]:
            raise ArtifactError(f"{path} is not the plugin library that the engine was built with", mend=again)
