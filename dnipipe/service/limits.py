"""After how long a neighbour, or this process itself, counts as hung: by what was measured, never by a setting alone.

a neighbour     says nothing, not even a Link: service.silence, or HUNG times its longest silence of late, if
                that is more. But at most service.hung and a second, or LONG times that silence: one cut of 20 s is no
                reason to wait for 80 s in the next one
this process    its loop stands: service.hung, or HUNG times its longest step of late, if that is more; what it does for
                the first time may have to be compiled: FIRST times service.hung
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

HUNG = 4.0  # times the longest silence, or step, of late
LONG = 2.0  # times a silence that was long itself
FIRST = 5.0  # times service.hung
STOOD = 2.0  # seconds for one turn of the loop, above which it did not listen: a long step, or it was stopped
TURN = 1.0  # seconds, at most, for which the loop waits before it looks around again
RECENT = 100  # silences and steps that are remembered


@dataclass(frozen=True)
class Limit:
    """So many seconds, and why so many."""

    seconds: float
    source: str

    def __str__(self) -> str:
        return f"{shown(self.seconds)} s ({self.source})"


def shown(seconds: float) -> str:
    return f"{round(seconds, 1):g}"


def of_silence(silence: float, hung: float, longest: float) -> Limit:
    """Of a neighbour whose longest silence of late was that. silence, hung: the settings."""
    learnt = f"its longest silence of late, {shown(longest)} s"
    most = max(
        Limit(hung + TURN, f"service.hung, and {TURN:g} s"),
        Limit(LONG * longest, f"{LONG:g} times {learnt}"),
        key=_seconds,
    )
    adapted = min(Limit(HUNG * longest, f"{HUNG:g} times {learnt}"), most, key=_seconds)
    return max(Limit(silence, "service.silence"), adapted, key=_seconds)


class Pace:
    """How long this process may take for a step; `hung` seconds, at least."""

    def __init__(self, hung: float) -> None:
        self._least = self._known = Limit(hung, "service.hung")
        self._first = Limit(FIRST * hung, f"{FIRST:g} times service.hung, for the first of its kind")
        self._kinds: set[type] = set()
        self._steps: deque[float] = deque(maxlen=RECENT)

    def took(self, kind: type, seconds: float) -> None:
        """A step, for a message of that kind, with the wait for it: a short one may be nothing but the wait."""
        self._kinds.add(kind)
        self._steps.append(seconds if seconds > STOOD else 0.0)
        longest = max(self._steps)
        learnt = Limit(HUNG * longest, f"{HUNG:g} times its longest step of late, {shown(longest)} s")
        self._known = max(self._least, learnt, key=_seconds)

    def limit(self, kind: type | None = None) -> Limit:
        """Of a step for such a message, or of whatever else the loop does."""
        known = kind is None or kind in self._kinds
        return self._known if known else max(self._known, self._first, key=_seconds)


def _seconds(limit: Limit) -> float:
    return limit.seconds


__all__ = ["RECENT", "STOOD", "TURN", "Limit", "Pace", "of_silence", "shown"]
