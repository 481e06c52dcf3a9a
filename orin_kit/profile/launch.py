"""Starting a worker and hearing it out."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from orin_kit.errors import EXIT_USER, OrinKitError, UserError
from orin_kit.profile.worker import Job

WORKER = [sys.executable, "-m", "orin_kit.profile.worker"]


def run_worker(job: Job, on_answer: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Measure one point in a fresh process (see `worker.run` for what it returns).

    Raises:
        UserError: what the worker found wrong with the artifact, or the system killed it (no memory).
        OrinKitError: it failed in another way.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        worker = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8"
        )
        assert worker.stdin and worker.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code says more
                worker.stdin.write(json.dumps(asdict(job)))
                worker.stdin.close()
            for line in worker.stdout:
                event = json.loads(line)
                if "answer" in event:
                    on_answer()
                elif "error" in event:
                    raise _error(**event["error"])
                else:
                    return dict(event["result"])
            code = worker.wait()
        finally:
            worker.kill()
            worker.wait()
            worker.stdout.close()
        said.seek(0)
        lines = said.read().strip().splitlines()
    if code == -signal.SIGKILL:
        what = f"the process that profiles {job.directory} was killed, most likely for want of memory"
        raise UserError(what, mend="use a smaller batch, a shorter context or a smaller model")
    what = f"the process that profiles {job.directory} ended with code {code}: {lines[-1] if lines else 'no message'}"
    raise OrinKitError(what, mend="report it")


def _error(what: str, mend: str, exit_code: int) -> OrinKitError:
    return (UserError if exit_code == EXIT_USER else OrinKitError)(what, mend)
