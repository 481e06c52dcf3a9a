"""A step that is always the same: run once plainly, then captured as a CUDA graph and launched from there."""

from __future__ import annotations

from collections.abc import Callable

from orin_kit.engine.cuda import Gpu, Launchable
from orin_kit.errors import OrinKitError


class Replay:
    """Work on a GPU's stream whose addresses and shapes never change; what it reads may.

    TensorRT wants one plain run after shapes were set, before a capture
    (https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html, CUDA Graphs). A step that
    cannot be captured runs plainly for ever.

    Attributes:
        refused: why it could not be captured; "" while it was not tried, or was.
    """

    def __init__(self, gpu: Gpu, work: Callable[[], None], *, capture: bool = True) -> None:
        self._gpu, self._work = gpu, work
        self._capture, self._warm = capture, False
        self._graph: Launchable | None = None
        self.refused = ""

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run(self) -> None:
        """Give the work to the stream."""
        if self._graph is None and self._warm and self._capture and not self.refused:
            try:
                self._graph = self._gpu.capture(self._work)
            except OrinKitError as error:
                self.refused = str(error)
        if self._graph is not None:
            self._graph.launch()
        else:
            self._work()
            self._warm = True
