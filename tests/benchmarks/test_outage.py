"""benchmarks.outage: its table and picture from given runs; and, slow, an outage of a small pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.outage.__main__ import run
from benchmarks.outage.report import NEVER, Outage, Settings, plots, table

SETTINGS = Settings(before=10, away=20, after=30, stages=3, rate=20)
GOES_ON = Outage(
    stage=2,
    way="go on",
    seed=0,
    trained=[60, 60, 40],
    alone=[0, 20, 0],
    losses=[(4, 3.5), (8, 3.0), (10, 2.0), (38, 1.9), (58, 1.5)],
)


def test_a_row_says_what_the_loss_was_by_the_clock_and_who_trained_what() -> None:
    """At 10 s the mean of the evaluations at 8 and 10 s; 10 s after is 40 s, 30 s after is 60 s."""
    other = replace(GOES_ON, seed=1, trained=[62, 60, 40], losses=[(10, 2.7), (60, 1.7)])
    text = table(SETTINGS, [GOES_ON, other, replace(GOES_ON, stage=None, way=NEVER, losses=[])])
    assert "|  | loss, before | loss, 10 s after | loss, 30 s after |" in text
    away = "| stage 2 away, the others go on | 2.600 ± 0.100 (2) | 1.900 ± 0.000 (1) | 1.600 ± 0.100 (2) "
    assert away + "| 61, 60, 40 | 0, 20, 0 |" in text
    assert "| never away | – | – | – |" in text


def test_a_picture_has_a_panel_for_each_stage_that_is_away_and_what_was_undisturbed_in_all() -> None:
    never = replace(GOES_ON, stage=None, way=NEVER, losses=[(1, 4.0)])
    (plot,) = plots(SETTINGS, [never, GOES_ON, replace(GOES_ON, stage=1, way="wait"), replace(GOES_ON, seed=1)])
    first, second = plot.panels.values()
    assert first[NEVER] == second[NEVER] == ([1], [4.0])
    assert first.keys() - {NEVER} == {"the others go on"} and second.keys() - {NEVER} == {"the others wait"}


@pytest.mark.slow
def test_who_waits_trains_no_more_than_the_stage_that_is_away(tmp_path: Path) -> None:
    settings = replace(SETTINGS, before=4, away=6, after=6)
    waits, goes_on = (run(settings, 2, way, seed=0) for way in ("wait", "go on"))
    assert sum(waits.alone) == 0 and max(waits.trained) - min(waits.trained) < 20  # a window, and what was lost with it
    assert goes_on.trained[0] - goes_on.trained[2] > 20 and goes_on.alone[1] > 20
