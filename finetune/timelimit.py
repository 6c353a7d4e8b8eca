"""How long a command may take, by the clock on the wall: is there time for one more step and for saving after it?"""

from __future__ import annotations

import time
from collections.abc import Callable

from finetune.terminal import duration

_FADING = 0.9
"""What a step adds to the estimate of the next one fades by this: one slow step among many is not remembered long."""
_MARGIN = 1.1
_CLOSING = 1.0
"""Seconds from the last save to the end of the process: the tracker's end, the report's page."""


class TimeLimit:
    """``seconds`` from now on. Steps and saves are measured as they come: the caller tells of each."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.words = f"before its {duration(seconds)} were over"
        self._clock = clock
        self._end = clock() + seconds
        self._step = self._saving = 0.0

    def saved(self, seconds: float) -> None:
        """A save took, or is expected to take, so long."""
        self._saving = max(self._saving, seconds)

    def remaining(self) -> float:
        """Seconds to the end."""
        return self._end - self._clock()

    def left(self) -> float:
        """Seconds that work may still take: what a save and the end of the process take is kept back."""
        return self.remaining() - _MARGIN * self._saving - _CLOSING

    def allows(self, step: float) -> bool:
        """Whether another step fits, after one that took ``step`` seconds; the slowest of the last ones counts."""
        self._step = max(step, self._step * _FADING)
        return self.left() >= _MARGIN * self._step
