"""What is said at the end of a run."""

from __future__ import annotations

from dnipipe.metrics import LABELS
from dnipipe.metrics.clock import shares
from dnipipe.result import spent


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
