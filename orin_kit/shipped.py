"""Where the files that come along lie: the demo family, recipes, targets, calibration chats."""

from __future__ import annotations

from pathlib import Path

from orin_kit.errors import OrinKitError


def calibration() -> Path:
    """The folder of that name: beside the package in a checkout, inside it when installed.

    Raises:
        OrinKitError: the installation is damaged.
    """
    here = Path(__file__).parent
    for candidate in (here / "calibration", here.parent / "calibration"):
        if (candidate / "recipes" / "demo.yaml").is_file():
            return candidate
    raise OrinKitError(f"{here} has no calibration/ with the demo family", mend="install orin-kit again")
