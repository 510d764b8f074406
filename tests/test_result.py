"""What is said at the beginning of a run, and at its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dnipipe.config import build
from dnipipe.metrics import LABELS
from dnipipe.metrics.clock import shares
from dnipipe.result import spent, table
from dnipipe.split import Plan

PLAN = Plan(
    layers=("embed", "block", "scores"),
    boundaries=(1,),
    seconds=(0.3, 0.1),
    parameters=(10, 20, 30),
    shapes=((8, 16, 4),) * 3,
    dtypes=("float32",) * 3,
    x=(8, 16),
    x_dtype="int64",
    y=(8, 16),
    classes=50257,
    predicting=(0.27, 0.0),
)


def test_each_stage_has_a_line() -> None:
    assert list(table(build({}), replace(PLAN, predicting=(0.1, 0.0)))) == [
        "stage 0 layers embed: 10 parameters, 300.0 ms a batch (75% of all)",
        "stage 1 layers block … scores: 50 parameters, 100.0 ms a batch (25% of all)",
    ]


def test_a_vocabulary_that_costs_more_than_the_layers_has_a_hint() -> None:
    *_, hint = table(build({}), PLAN)
    assert "all 50,257 classes" in hint and "up to 90% of a stage's time: predictor.sampled = 64" in hint


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        ({"sampled": 64}, PLAN),
        ({"name": "linear"}, PLAN),
        ({}, replace(PLAN, classes=256)),
        ({}, replace(PLAN, classes=None)),
        ({}, replace(PLAN, seconds=(0.6, 0.1))),
        ({}, replace(PLAN, predicting=())),  # of an earlier version
    ],
)
def test_who_need_not_change_anything_has_none(settings: dict[str, Any], plan: Plan) -> None:
    assert not [line for line in table(build({"predictor": settings}), plan) if line.startswith("hint")]


def test_the_time_of_each_stage_adds_up_to_a_hundred() -> None:
    """A line for each thing that took time, and for what nobody accounts for even if there is none of it."""
    first = dict.fromkeys(LABELS, 0.0) | {"forward": 2.0, "wait_input": 5.0, "unaccounted": 1.0}
    second = dict.fromkeys(LABELS, 0.0) | {"forward": 1.0, "backward": 1.999, "send": 0.001}
    title, *lines = spent([{"index": k, "shares": shares(seconds)} for k, seconds in enumerate((first, second))])
    assert title.split() == ["time,", "%", "stage", "0", "stage", "1"]
    assert [line.split() for line in lines] == [
        ["forward", "25.0", "33.3"],
        ["backward", "0.0", "66.6"],
        ["wait", "input", "62.5", "0.0"],
        ["unaccounted", "12.5", "0.0"],
    ]
    assert len({len(line) for line in [title, *lines]}) == 1
