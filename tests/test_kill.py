"""kill -9 at random moments: see tools/kill_test.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "kill_test.py"


@pytest.mark.slow
def test_no_half_written_artifact_is_ever_accepted() -> None:
    done = subprocess.run([sys.executable, TOOL, "--kills", "24"], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
