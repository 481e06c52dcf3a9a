"""Resident memory of a process that takes and gives back a known amount."""

from __future__ import annotations

import json
import subprocess
import sys

TAKE = 200_000_000
PROGRAM = f"""
import json
from orin_kit.profile.memory import peak_bytes, resident_bytes
before = resident_bytes(), peak_bytes()
block = bytearray({TAKE})  # zeroed, so every page is touched; large, so freeing gives it back
during = resident_bytes(), peak_bytes()
del block
print(json.dumps([before, during, (resident_bytes(), peak_bytes())]))
"""


def test_the_peak_remembers_what_was_given_back_and_starts_afresh() -> None:
    import mmap

    # This process is large when the child is made: `ru_maxrss` would hand that down.
    with mmap.mmap(-1, 2 * TAKE) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, during, after = json.loads(done.stdout)
    assert 0 < before[0] <= before[1] < TAKE
    assert TAKE <= during[0] - before[0] < 1.1 * TAKE
    assert after[0] < before[0] + 0.1 * TAKE
    assert after[1] >= 0.99 * during[0]
