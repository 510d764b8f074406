"""A stage waits for a neighbour before there is a Keeper: it loses nothing that it hears, and counts as alive.

The links are fakes, and what is heard is what the test says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from dnipipe.errors import WaitTimeout
from dnipipe.messages import Message, Report
from dnipipe.service import session
from dnipipe.service.links import Event, Gone, Up
from dnipipe.transport import Side

Heard = tuple[Side, Message]


class Ears:
    """Links of stage 0: each receive, one of `turns` happens, which may tell of the neighbour and return a message."""

    stage = 0

    def __init__(self, *turns: Callable[[Ears], Heard | None]) -> None:
        self.turns, self.events, self.there = deque(turns), deque[tuple[Side, Event]](), False

    def receive(self, sides: Sequence[Side], timeout: float) -> Heard | None:
        return self.turns.popleft()(self) if self.turns else None

    def up(self, side: Side) -> bool:
        return self.there

    def comes(self, last: int) -> None:
        self.there = True
        self.events.append((Side.NEXT, Up(SimpleNamespace(last=last))))  # type: ignore[arg-type]

    def goes(self) -> None:
        self.there = False
        self.events.append((Side.NEXT, Gone("it is gone")))


REPORT = (Side.NEXT, Report(1, 60, {"batches": 60.0}, final=True))


def greets_and_reports(ears: Ears) -> Heard:
    """Both were in the socket: receive stops at the first message, not at what it has seen of a neighbour."""
    ears.comes(60)
    return REPORT


def blinks(ears: Ears) -> None:
    ears.comes(40)
    ears.goes()


def nothing(ears: Ears) -> None:
    pass


def test_what_came_right_behind_the_greeting_is_not_lost() -> None:
    ears = Ears(nothing, blinks, greets_and_reports)
    assert session._wait(ears, Side.NEXT, 60.0) == (60, REPORT)  # type: ignore[arg-type]


def test_who_only_greets_is_there_too() -> None:
    assert session._wait(Ears(lambda ears: ears.comes(7)), Side.NEXT, 60.0) == (7, None)  # type: ignore[arg-type]


def test_who_never_comes_is_named() -> None:
    with pytest.raises(
        WaitTimeout, match=r"stage 0 waited 0\.05 s \(service\.patience\) for stage 1, which never came"
    ):
        session._wait(Ears(), Side.NEXT, 0.05)  # type: ignore[arg-type]
