"""Where a stage's time goes: every second has one owner.

    loop   receive   wait_input   receive   serialize   receive   loop   keep   forward   send   serialize   …
    ───────┴─────────┴────────────┴─────────┴───────────┴─────────┴──────┴──────┴─────────┴──────┴──────────► time

That is, by construction: the innermost open span of the clock, and outside of all spans "unaccounted".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

# what a stage is there for; "loss" is the last stage's, in the place of a predictor; on a GPU they are what it takes to
# tell it what to do, and "device" is the wait for it to be done
WORK = ("forward", "backward", "predictor", "loss", "optimizer", "device", "data", "evaluation", "checkpoint")
# for a batch, for room in a full window, for room in a full queue, and for the last answers behind the last batch
WAITS = ("wait_input", "wait_window", "wait_send", "wait_end")
# what the pipeline costs on top; "keep" is what else a stage does with a batch: tensors kept until g comes, and freed;
# "loop" finds out what comes next: what is due, whether there is room, from where
OVERHEAD = ("serialize", "send", "receive", "keep", "loop", "report", "unaccounted")
LABELS = (*WORK, *WAITS, *OVERHEAD)

Record = Callable[[str, float, float, int], None]  # label, begin, end (seconds of the clock), batch id or 0


class Span:
    """`with clock.span(label)`: the time belongs to label, and then again to whom it belonged before."""

    __slots__ = ("clock", "entered", "label", "processor", "seconds")

    def __init__(self, clock: Clock, label: str) -> None:
        self.clock, self.label = clock, label
        self.entered = 0  # times
        self.seconds = self.processor = 0.0

    def __enter__(self) -> None:
        self.entered += 1
        self.clock.settle()
        self.clock.open.append(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clock.settle()
        self.clock.open.pop()


class Clock:
    """Accounts for every second: `seconds()` adds up to the time since the clock was made or restarted, exactly.

    So does `processor()` for the seconds that this thread had a processor. The two differ where more processes run
    than there are cores: one that is set aside in the middle of a send has not spent that time on sending.

    A span costs 1 to 2 µs (docs/files.md), half of it the kernel's answer to how long the thread had a processor.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, worked: Callable[[], float] = time.thread_time
    ) -> None:
        self.now, self.worked = now, worked
        self.batch = 0  # the batch that what is done now belongs to, 0: none; only a trace asks
        self.record: Record | None = None  # told of each stretch of time that had one owner but `_between`
        self._spans = {label: Span(self, label) for label in LABELS}
        self._nobody = self._spans["unaccounted"]
        self._between = (self._nobody, self._spans["loop"])  # microseconds between two others
        self.restart()

    def span(self, label: str) -> Span:
        """The same one for each label: it may be kept, and be entered while it is open."""
        return self._spans[label]

    def restart(self) -> None:
        """What lies before is nobody's time. Not within a span."""
        self.open = [self._nobody]  # the innermost is the last
        self._since, self._worked_since = self.now(), self.worked()
        for span in self._spans.values():
            span.seconds = span.processor = 0.0

    def settle(self) -> None:
        """Give the time up to now to whom it belongs."""
        now, worked = self.now(), self.worked()
        owner = self.open[-1]
        owner.seconds += now - self._since
        owner.processor += worked - self._worked_since
        if self.record is not None and owner not in self._between:
            self.record(owner.label, self._since, now, self.batch)
        self._since, self._worked_since = now, worked

    def seconds(self) -> dict[str, float]:
        self.settle()
        return {label: span.seconds for label, span in self._spans.items()}

    def processor(self) -> dict[str, float]:
        self.settle()
        return {label: span.processor for label, span in self._spans.items()}


def spending(seconds: dict[str, float], worked: dict[str, float]) -> dict[str, float]:
    """Seconds by label, busy and idle; and the overhead, what the processor did that is not the model's, as two shares.

    overhead: of the stage's whole time. overhead_of_work: of the processor's time, what it does in a wait included, so
    the same however many processes share a core.
    """
    total, work = sum(seconds.values()), sum(worked.values())
    idle = sum(seconds[label] for label in WAITS)
    own = sum(worked[label] for label in OVERHEAD)
    return {
        "seconds": total,
        "busy_seconds": total - idle,
        "idle_seconds": idle,
        "idle": idle / total if total > 0 else 0.0,
        "overhead": own / total if total > 0 else 0.0,
        "overhead_of_work": (own + sum(worked[label] for label in WAITS)) / work if work > 0 else 0.0,
        **{f"seconds.{label}": value for label, value in seconds.items()},
        **{f"processor.{label}": value for label, value in worked.items()},
    }


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Of the whole time, by label; they add up to 1."""
    total = sum(seconds.values())
    return {label: value / total if total > 0 else 0.0 for label, value in seconds.items()}
