"""A stage waits for a neighbour before there is a Keeper: it loses nothing that it hears, and counts as alive.

The links are fakes, and what is heard is what the test says.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dnipipe.config import build
from dnipipe.errors import PeerLost, Replaced, WaitTimeout
from dnipipe.messages import Message, Report
from dnipipe.service import session
from dnipipe.service.limits import Limit
from dnipipe.service.links import Event, Gone, Up
from dnipipe.service.place import ALIVE, Place, unhealthy
from dnipipe.transport import Side

Heard = tuple[Side, Message]


class Ears:
    """Links: each receive, one of `turns` happens, which may tell of the neighbour and return a message."""

    def __init__(self, *turns: Callable[[Ears], Heard | None], stage: int = 0) -> None:
        self.stage, self.waited = stage, list[float]()
        self.turns, self.events, self.there = deque(turns), deque[tuple[Side, Event]](), False

    def receive(self, sides: Sequence[Side], timeout: float) -> Heard | None:
        self.waited.append(timeout)
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


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.taken(tmp_path, 0)


def wait(ears: Ears, place: Place, patience: float = 60.0, hung: float = 60.0) -> tuple[int, Heard | None]:
    links: Any = ears
    return session._wait(links, patience, session._Watch(place, hung, ears.stage))


def test_what_came_right_behind_the_greeting_is_not_lost(place: Place) -> None:
    ears = Ears(nothing, blinks, greets_and_reports)
    assert wait(ears, place) == (60, REPORT)


def test_who_only_greets_is_there_too(place: Place) -> None:
    assert wait(Ears(lambda ears: ears.comes(7)), place) == (7, None)


def test_who_never_comes_is_named(place: Place) -> None:
    with pytest.raises(
        WaitTimeout, match=r"stage 0 waited 0\.05 s \(service\.patience\) for stage 1, which never came"
    ):
        wait(Ears(), place, patience=0.05)


# -- meanwhile ---------------------------------------------------------------------------------------------------


def agreement(ears: Ears, place: Place) -> object:
    """The other wait: stage 1's, for what stage 0 has decided."""
    job: Any = SimpleNamespace(config=build({"pipeline": {"stages": 2}, "service": {"patience": 60.0}}))
    model: Any = None
    links: Any = ears
    return session._agreement(job, model, [], place, links, session._Watch(place, 60.0, ears.stage))


WAITS = pytest.mark.parametrize("waits", [wait, agreement])
Waits = Callable[[Ears, Place], object]


def at_stage(waits: Waits, *turns: Callable[[Ears], Heard | None]) -> Ears:
    return Ears(*turns, stage=0 if waits is wait else 1)


class Enough(Exception):
    """The test has seen what it wanted to."""


@WAITS
def test_it_counts_as_alive(waits: Waits, place: Place, tmp_path: Path) -> None:
    def look(ears: Ears) -> None:
        assert unhealthy(tmp_path, 0, 60.0) == ""
        raise Enough

    assert "has not begun" in unhealthy(tmp_path, 0, 60.0)
    with pytest.raises(Enough):
        waits(at_stage(waits, look), place)


def soon(ears: Ears) -> None:
    """The next turn is a look around, as after a second."""
    session.time.monotonic.jump()  # type: ignore[attr-defined]


class Clock:
    """time.monotonic, which jumps."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def jump(self) -> None:
        self.now += 1.0


@pytest.fixture
def jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=Clock()))


@WAITS
def test_it_ends_if_another_process_has_its_place(waits: Waits, place: Place, tmp_path: Path, jumps: None) -> None:
    def replaced(ears: Ears) -> None:
        Place.taken(tmp_path, 0)
        soon(ears)

    with pytest.raises(Replaced, match=f"ends: {place.incarnation + 1} has taken its place"):
        waits(at_stage(waits, soon, replaced), place)


@WAITS
def test_it_ends_if_the_process_that_started_it_is_gone(
    waits: Waits, place: Place, jumps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def orphaned(ears: Ears) -> None:
        monkeypatch.setattr(os, "getppid", lambda: 1_000_000_000)
        soon(ears)

    with pytest.raises(PeerLost, match="the process that started it is gone"):
        waits(at_stage(waits, soon, orphaned), place)


def test_a_turn_is_shorter_than_what_counts_as_hung(place: Place) -> None:
    ears = Ears(nothing, lambda ears: ears.comes(7))
    wait(ears, place, hung=0.5)
    assert max(ears.waited) < 0.5


def test_a_longer_limit_holds_at_once_and_a_shorter_one_from_the_next_look_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jumps: None
) -> None:
    armed: list[float] = []
    quiet = SimpleNamespace(dump_traceback_later=lambda seconds, exit: armed.append(seconds))
    monkeypatch.setattr(session, "faulthandler", quiet)
    watch, first = session._Watch(place, 60.0, 0), Limit(300.0, "for the first time")
    for limit in (watch.waiting, watch.waiting, first, first, watch.waiting):
        watch.alive(limit)
    assert armed == [60.0, 300.0] and "300.0 for the first time" in (place.folder / ALIVE).read_text()
    session.time.monotonic.jump()  # type: ignore[attr-defined]
    watch.alive(watch.waiting)
    assert armed == [60.0, 300.0, 60.0] and (place.folder / ALIVE).read_text() == "60.0 service.hung"


@WAITS
def test_nobody_watches_behind_it(waits: Waits, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is building the stage, which may take longer than `service.hung`."""
    watched: list[bool] = []
    quiet = SimpleNamespace(
        dump_traceback_later=lambda *_, **__: watched.append(True),
        cancel_dump_traceback_later=lambda: watched.append(False),
    )
    monkeypatch.setattr(session, "faulthandler", quiet)

    def enough(ears: Ears) -> None:
        assert watched[-1]
        raise Enough

    with pytest.raises(Enough):
        waits(at_stage(waits, enough), place)
    assert not watched[-1]
