"""How long a neighbour has been waited for, by a clock that the test moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dnipipe.errors import WaitTimeout
from dnipipe.service.absence import Absence
from dnipipe.transport import Side

BOTH = list(Side)


def an_absence(index: int = 1) -> tuple[Absence, SimpleNamespace]:
    clock = SimpleNamespace(now=1000.0)
    return Absence(index, 30.0, lambda: clock.now), clock


@pytest.mark.parametrize(("side", "named"), [(Side.NEXT, "stage 2"), (Side.PREVIOUS, "stage 0")])
def test_who_is_away_too_long_is_named(side: Side, named: str) -> None:
    absence, clock = an_absence()
    absence.gone(side)
    clock.now += 29.9
    absence.check(BOTH)
    clock.now += 0.1
    with pytest.raises(WaitTimeout, match=rf"^stage 1 waited 30 s for {named}, which is away \(service.patience = 30"):
        absence.check(BOTH)
    absence.check([other for other in BOTH if other is not side])  # nobody waits for that one


def test_who_is_there_is_not_waited_for() -> None:
    absence, clock = an_absence()
    absence.gone(Side.NEXT)
    absence.back(Side.NEXT)
    clock.now += 100.0
    absence.check(BOTH)
    absence.gone(Side.NEXT)  # and the next time it counts anew
    clock.now += 29.0
    absence.check(BOTH)


def test_what_the_stage_does_alone_is_no_wait() -> None:
    absence, clock = an_absence()
    absence.gone(Side.NEXT)
    for _ in range(5):
        clock.now += 20.0
        absence.worked()
        absence.check(BOTH)
    clock.now += 30.0
    with pytest.raises(WaitTimeout):
        absence.check(BOTH)


def test_nor_is_the_time_in_which_this_process_stood_still() -> None:
    absence, clock = an_absence()
    absence.gone(Side.NEXT)
    clock.now += 100.0
    absence.stood(100.0)
    absence.check(BOTH)
