"""After how long somebody counts as hung, and what is said of why."""

from __future__ import annotations

import pytest

from dnipipe.service.limits import RECENT, Pace, of_silence


@pytest.mark.parametrize(
    ("longest", "said"),
    [
        (0.0, "10 s (service.silence)"),
        (2.0, "10 s (service.silence)"),
        (5.0, "20 s (4 times its longest silence of late, 5 s)"),
        (20.0, "61 s (service.hung, and 1 s)"),
        (50.0, "100 s (2 times its longest silence of late, 50 s)"),
        (90.0, "180 s (2 times its longest silence of late, 90 s)"),
    ],
)
def test_a_neighbour_may_be_silent_by_what_it_was(longest: float, said: str) -> None:
    """A cut of 20 s is no reason to wait 80 s in the next one; but steps of 90 s, whatever the settings, are steps."""
    assert str(of_silence(10.0, 60.0, longest)) == said


class Step:
    pass


class Look:
    pass


def test_the_first_step_of_a_kind_may_take_longer() -> None:
    pace = Pace(60.0)
    assert str(pace.limit()) == "60 s (service.hung)"
    assert str(pace.limit(Step)) == "300 s (5 times service.hung, for the first of its kind)"
    pace.took(Step, 0.1)
    assert str(pace.limit(Step)) == "60 s (service.hung)"
    assert str(pace.limit(Look)) == "300 s (5 times service.hung, for the first of its kind)"


def test_steps_that_are_long_make_the_limit_longer_and_are_forgotten() -> None:
    pace = Pace(60.0)
    pace.took(Step, 70.0)
    assert str(pace.limit(Step)) == str(pace.limit()) == "280 s (4 times its longest step of late, 70 s)"
    for _ in range(RECENT - 1):
        pace.took(Step, 20.0)
    assert pace.limit(Step).seconds == 280.0 and pace.limit(Look).seconds == 300.0
    pace.took(Step, 20.0)
    assert str(pace.limit(Step)) == "80 s (4 times its longest step of late, 20 s)"


def test_what_is_done_for_the_first_time_has_no_less_than_what_is_known() -> None:
    pace = Pace(60.0)
    pace.took(Step, 80.0)
    assert pace.limit(Look).seconds == 320.0


def test_a_turn_that_is_short_may_be_nothing_but_the_wait_for_its_message() -> None:
    pace = Pace(0.5)
    pace.took(Step, 1.1)
    assert str(pace.limit(Step)) == "0.5 s (service.hung)"
