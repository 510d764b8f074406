"""Seconds that add up: each has one owner."""

from __future__ import annotations

import pytest

from dnipipe.metrics import LABELS, Clock
from tests.metrics.conftest import Time


def test_an_inner_span_suspends_the_outer_one() -> None:
    time = Time()
    clock = Clock(time, time)
    time.passes(1)
    with clock.span("forward"):
        time.passes(2)
        with clock.span("send"):
            time.passes(4)
            with clock.span("forward"):  # the same label again: spans are made once and shared
                time.passes(8)
            time.passes(16)
        time.passes(32)
    time.passes(64)
    expected = {"unaccounted": 1.0 + 64, "forward": 2.0 + 8 + 32, "send": 4.0 + 16}
    assert {label: spent for label, spent in clock.seconds().items() if spent} == expected


def test_every_second_has_one_owner_also_while_a_span_is_open() -> None:
    time = Time()
    clock = Clock(time, time)
    for label in LABELS:
        with clock.span(label):
            time.passes(0.5)
            assert sum(clock.seconds().values()) == time.now - 100  # halves: exact
        time.passes(0.25)
    assert sum(clock.seconds().values()) == time.now - 100
    assert clock.seconds()["wait_input"] == 0.5 and clock.seconds()["unaccounted"] == 0.5 + 0.25 * len(LABELS)


def test_an_exception_ends_its_span() -> None:
    time = Time()
    clock = Clock(time, time)
    with pytest.raises(KeyError), clock.span("backward"):
        time.passes(1)
        raise KeyError
    time.passes(2)
    assert clock.seconds()["backward"] == 1 and clock.seconds()["unaccounted"] == 2


def test_a_span_that_was_set_aside_has_not_worked() -> None:
    """Ten seconds in a send of which the thread had a processor for one."""
    wall, worked = Time(), Time()
    clock = Clock(wall, worked)
    with clock.span("send"):
        wall.passes(10)
        worked.passes(1)
    assert clock.seconds()["send"] == 10 and clock.processor()["send"] == 1


def test_a_span_that_is_kept_belongs_to_the_clock_after_a_restart() -> None:
    """A transport is given its spans before the run begins, and a run begins with a restart."""
    time = Time()
    clock = Clock(time, time)
    kept = clock.span("serialize")
    with kept:
        time.passes(1)
    clock.restart()
    with kept:
        time.passes(2)
    assert sum(clock.seconds().values()) == clock.seconds()["serialize"] == 2


def test_what_is_recorded_is_disjoint_and_leaves_out_only_what_nobody_owns() -> None:
    time = Time()
    clock = Clock(time, time)
    found: list[tuple[str, float, float, int]] = []
    clock.record = lambda *span: found.append(span)
    time.passes(1)
    clock.batch = 7
    with clock.span("send"):
        time.passes(2)
        with clock.span("serialize"):
            time.passes(4)
        clock.batch = 8
        time.passes(8)
    time.passes(16)
    clock.seconds()
    assert found == [("send", 101, 103, 7), ("serialize", 103, 107, 7), ("send", 107, 115, 8)]
