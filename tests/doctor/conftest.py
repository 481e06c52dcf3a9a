"""Shared by the doctor's tests: a Jetson's files in a temporary directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetson_root import agx_orin


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """An AGX Orin with JetPack 6.2 whole, in its fastest mode, clocks fixed, cool."""
    return agx_orin(tmp_path / "orin")
