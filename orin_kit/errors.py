"""The error family: every failure says what is wrong, where, and how to mend it.

`UserError` and its children end the command with exit code 2, everything else with 1, a missed target with 3.
"""

from __future__ import annotations

EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_TARGET_MISSED = 3


class OrinKitError(Exception):
    """A failure that is ours: exit code 1.

    Args:
        what: one line that names the thing and the place ("model.safetensors in student/ is cut short at byte 812").
        mend: one line that says what to do about it.
    """

    exit_code = EXIT_INTERNAL

    def __init__(self, what: str, mend: str = "") -> None:
        self.what = " ".join(what.split())
        self.mend = " ".join(mend.split())
        super().__init__(f"{self.what}: {self.mend}" if self.mend else self.what)


class UserError(OrinKitError):
    """A failure that the user can mend: exit code 2."""

    exit_code = EXIT_USER


class ArtifactError(UserError):
    """A directory is not the artifact that the command needs, or is not whole."""


class UnsupportedModelError(UserError):
    """A model family, or a field of its config, that orin-kit does not know."""


class TrainingDivergedError(UserError):
    """The loss is no longer a finite number."""
