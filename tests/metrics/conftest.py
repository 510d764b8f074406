"""What the tests of metrics measure with: a clock that stands until it is told."""

from __future__ import annotations

from dnipipe.metrics import Clock, StageMetrics


class Time:
    """A clock that stands until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def measured(time: Time | None = None) -> StageMetrics:
    time = time or Time()
    return StageMetrics(1, 4, Clock(time, time))
