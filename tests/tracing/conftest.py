"""Traces of three stages written by hand, so that every time in them is known.

ms behind 40 n    0        10       20       30       40
stage 0           F s ╲                     ╱ r            F forward, 2 ms · s send, 1 ms · r receive, 0.5 ms
stage 1             r  F s ╲       ╱ r  s ╱
stage 2                  r  F s ╱
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dnipipe.tracing import Trace, writer
from dnipipe.tracing.writer import RECEIVED, SENT

STAGES, LAST = 3, 2
DELAY = 3.75  # ms that the fastest message is under way
Late = Callable[[int, str], float]  # batch, type of message -> ms that it takes longer
Write = Callable[..., Path]


class Hand:
    """Writes one stage's spans in milliseconds; its clock is so many seconds ahead."""

    def __init__(self, trace: Trace, stage: int, ahead: float, late: Late) -> None:
        self.trace, self.stage, self.ahead, self.late = trace, stage, ahead, late

    def span(self, name: str, batch: int, at: float, length: float) -> None:
        self.trace.span(name, self.ahead + at / 1e3, self.ahead + (at + length) / 1e3, batch)

    def sends(self, kind: str, peer: int, batch: int, at: float) -> None:
        self.trace.message(SENT, peer, kind, batch, self.ahead + (at + 0.5) / 1e3)
        self.span("send", batch, at, 1.0)

    def receives(self, kind: str, peer: int, batch: int, at: float) -> None:
        at += self.late(batch, kind)
        self.trace.message(RECEIVED, peer, kind, batch, self.ahead + (at + 0.25) / 1e3)
        self.span("receive", 0, at, 0.5)

    def batch(self, n: int) -> None:
        k, at = self.stage, 40.0 * n
        if k > 0:
            self.receives("Activation", k - 1, n, at + 10 * k - 4)
        self.span("forward", n, at + 10 * k, 2.0)
        if k < LAST:
            self.sends("Activation", k + 1, n, at + 10 * k + 2)
            self.receives("Gradient", k + 1, n, at + 10 * (2 * LAST - k) - 4)
        if k > 0:
            self.sends("Gradient", k - 1, n, at + 10 * (2 * LAST - k) + 2)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """write(clocks, ahead, batches, late) -> a run's folder; the clocks are so many seconds ahead of the true time."""

    def written(
        clocks: Sequence[str] = ("here", "here", "here"),
        ahead: Sequence[float] = (100.0, 100.0, 100.0),
        batches: int = 30,
        late: Late = lambda batch, kind: 0.0,
    ) -> Path:
        for stage in range(STAGES):
            monkeypatch.setattr(writer, "clock_of_this_machine", lambda stage=stage: clocks[stage])
            trace = Trace(tmp_path / "trace" / f"stage-{stage}.jsonl", stage, STAGES)
            hand = Hand(trace, stage, ahead[stage], late)
            for n in range(1, batches + 1):
                hand.batch(n)
            trace.close()
        return tmp_path

    return written
