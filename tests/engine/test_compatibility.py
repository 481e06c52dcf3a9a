"""What can be built with which TensorRT, and what an engine refuses to run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orin_kit.engine.compatibility import (
    NETWORK,
    PARSED,
    PLUGIN,
    SELECT,
    Machine,
    cache_writing,
    check_engine,
    parse_version,
)
from orin_kit.errors import ArtifactError, UserError
from orin_kit.manifest import sha256_file

ORIN = Machine("10.3.0", 87, "Orin")


@pytest.mark.parametrize(
    ("kv", "dialect", "kv_update", "kv_bits", "tensorrt", "writing"),
    [
        ("plugin", "trt_plugin", "select", 16, "10.3", PLUGIN),
        ("plugin", "trt_plugin", "select", 8, "10.16.1.11", PLUGIN),
        ("native", "trt_native", "select", 16, "10.3.0", SELECT),
        ("native", "trt_native", "select", 16, "10.14.1", SELECT),
        ("native", "trt_native", "select", 16, "10.15", NETWORK),
        ("native", "trt_native", "select", 16, "10.16", NETWORK),
        ("native", "trt_native", "select", 8, "10.16", SELECT),
        ("native", "trt_native", "layer", 16, "11.4", PARSED),
    ],
)
def test_how_a_cache_is_written(
    kv: str, dialect: str, kv_update: str, kv_bits: int, tensorrt: str, writing: str
) -> None:
    assert cache_writing(kv, dialect, kv_update, kv_bits, tensorrt, "onnx") == writing


@pytest.mark.parametrize(
    ("kv", "dialect", "kv_update", "tensorrt", "message"),
    [
        ("plugin", "trt_plugin", "select", "10.2", "TensorRT 10.2 is not supported.*JetPack 6.2"),
        ("plugin", "trt_plugin", "select", "12.0", "12.0 is not supported"),
        ("plugin", "trt_plugin", "select", "new", "'new' is no version"),
        ("plugin", "trt_native", "select", "10.3", "trt_native.*--dialect trt_plugin, or build with --kv native"),
        ("native", "trt_plugin", "select", "10.3", "--dialect trt_native, or build with --kv plugin"),
        ("plugin", "ort", "select", "10.3", "the ort dialect.*export it with --dialect trt_plugin$"),
        ("native", "trt_native", "layer", "10.16", "TRT_KVCacheUpdate.*--kv-update select"),
        ("ring", "trt_native", "layer", "10.16", "--kv ring is not known.*plugin, native"),
    ],
)  # fmt: skip
def test_what_cannot_be_built(kv: str, dialect: str, kv_update: str, tensorrt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cache_writing(kv, dialect, kv_update, 16, tensorrt, "onnx")


def test_versions_are_numbers() -> None:
    assert parse_version("10.16.1.11") == (10, 16, 1, 11) > parse_version("10.9") > parse_version("10.3.0.post1")


def settings(directory: Path, **changes: Any) -> dict[str, Any]:
    (directory / "lib.so").write_bytes(b"kernels")
    library = {"name": "lib.so", "sha256": sha256_file(directory / "lib.so")}
    return {"sm": 87, "gpu": "Orin", "tensorrt": "10.3.0", "dialect": "trt_plugin", "plugin_library": library} | changes


def test_an_engine_of_this_machine(tmp_path: Path) -> None:
    check_engine(tmp_path, settings(tmp_path), ORIN)
    check_engine(tmp_path, settings(tmp_path, dialect="trt_native", plugin_library=None), ORIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sm=90, gpu="H100"), r"built for sm_90 \(H100\), this GPU is sm_87 \(Orin\).*build it again"),
        (dict(tensorrt="10.16.1"), r"built with TensorRT 10.16.1, this is 10.3.0.*build it again"),
        (dict(dialect="ort"), "is of dialect 'ort'"),
        (dict(plugin_library=None), "names no plugin library"),
        (dict(plugin_library={"name": "gone.so", "sha256": ""}), "lacks its plugin library gone.so"),
        (dict(plugin_library={"name": "lib.so", "sha256": "0" * 64}), "lib.so is not the plugin library"),
    ],
)
def test_an_engine_of_another_machine(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_engine(tmp_path, settings(tmp_path, **changes), ORIN)
