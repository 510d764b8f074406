"""Where a stage's time goes: every second has one owner.

That is, by construction: the innermost open span of the clock, and outside of all spans "overhead".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

WORK = ("forward", "backward", "predictor", "optimizer", "data", "checkpoint")  # what a stage is there for
OVERHEAD = ("send", "receive", "overhead")  # what the pipeline costs on top
LABELS = (*WORK, "idle", *OVERHEAD)


class _Span:
    """`with clock.span(label)`: the time belongs to label, and then again to whom it belonged before."""

    def __init__(self, clock: Clock, label: str) -> None:
        self.clock, self.label, self.outer = clock, label, list[str]()
        self.entered = 0  # times

    def __enter__(self) -> None:
        self.entered += 1
        self.outer.append(self.clock.switch(self.label))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clock.switch(self.outer.pop())


class Clock:
    """Accounts for every second: `seconds()` adds up to the time since the clock was made, exactly.

    So does `processor()` for the seconds that this thread had a processor. The two differ where more processes run
    than there are cores: one that is set aside in the middle of a send has not spent that time on sending.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, worked: Callable[[], float] = time.thread_time
    ) -> None:
        self.now, self.worked = now, worked
        self._owner, self._since, self._worked_since = "overhead", now(), worked()
        self._seconds = dict.fromkeys(LABELS, 0.0)
        self._processor = dict.fromkeys(LABELS, 0.0)
        self._spans = {label: _Span(self, label) for label in LABELS}

    def span(self, label: str) -> _Span:
        return self._spans[label]

    def switch(self, label: str) -> str:
        """Give the time from now on to `label`; returns whose it was."""
        now, worked = self.now(), self.worked()
        before = self._owner
        self._seconds[before] += now - self._since
        self._processor[before] += worked - self._worked_since
        self._owner, self._since, self._worked_since = label, now, worked
        return before

    def seconds(self) -> dict[str, float]:
        self.switch(self._owner)
        return dict(self._seconds)

    def processor(self) -> dict[str, float]:
        self.switch(self._owner)
        return dict(self._processor)


def shares(spent: dict[str, float], worked: dict[str, float]) -> dict[str, float]:
    """Seconds by label, busy and idle; and the overhead, what the processor did that is not the model's, as two shares.

    overhead: of the stage's whole time. overhead_of_work: of the processor's time, what it does in a wait included, so
    the same however many processes share a core.
    """
    total, work = sum(spent.values()), sum(worked.values())
    own = sum(worked[label] for label in OVERHEAD)
    return {
        "seconds": total,
        "busy_seconds": total - spent["idle"],
        "idle_seconds": spent["idle"],
        "idle": spent["idle"] / total if total > 0 else 0.0,
        "overhead": own / total if total > 0 else 0.0,
        "overhead_of_work": (own + worked["idle"]) / work if work > 0 else 0.0,
        **{f"seconds.{label}": value for label, value in spent.items()},
        **{f"processor.{label}": value for label, value in worked.items()},
    }
