"""One timeline of files whose clocks differ, each message with both its ends, and the part of it that is asked for."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from dnipipe.errors import DnipipeError, TraceError, UsageError
from dnipipe.tracing import Timeline, Trace, chrome, cut, merged, read, some_batches, write_chrome
from dnipipe.tracing.writer import RECEIVED, SENT
from tests.tracing.conftest import DELAY, Write


def begins(timeline: Timeline) -> list[float]:
    """Of each stage's forward of batch 1, milliseconds."""
    spans = [span for trace in timeline.stages for span in trace.spans if (span.name, span.batch) == ("forward", 1)]
    return [1e3 * span.begin for span in spans]


def test_stages_of_one_machine_stay_as_they_are(write: Write) -> None:
    """Also if a message is slower in one direction than in the other, which would deceive an estimate."""
    timeline = merged(read(write(late=lambda batch, kind: 3.0 * (kind == "Gradient"))))
    assert begins(timeline) == pytest.approx([0, 10, 20])


@pytest.mark.parametrize(
    ("clocks", "ahead"),
    [
        (("a", "b", "c"), (100.0, 3.5, 7000.25)),
        (("a", "a", "b"), (100.0, 100.0, 0.0)),
        (("a", "b", "a"), (100.0, 99.9, 100.0)),
        (("a", "b", "b"), (0.0, 1e6, 1e6)),
    ],
)
def test_clocks_of_other_machines_are_put_right(
    write: Write, clocks: tuple[str, ...], ahead: tuple[float, ...]
) -> None:
    """By the fastest message of each direction, whichever it is: most had to wait."""

    def late(batch: int, kind: str) -> float:
        return 0.0 if batch == (7 if kind == "Activation" else 11) else 2.0

    timeline = merged(read(write(clocks, ahead, late=late)))
    assert begins(timeline) == pytest.approx([0, 10, 20], abs=1e-3)
    took = [1e3 * (flow.received - flow.sent) for flow in timeline.flows]
    assert min(took) == pytest.approx(DELAY, abs=1e-3) and max(took) == pytest.approx(DELAY + 2, abs=1e-3)


def test_what_differs_between_the_directions_is_halved(write: Write) -> None:
    timeline = merged(
        read(write(("a", "b", "b"), (0.0, 50.0, 50.0), late=lambda batch, kind: 3.0 * (kind == "Gradient")))
    )
    assert begins(timeline) == pytest.approx([0, 10 + 1.5, 20 + 1.5], abs=1e-3)


def test_clocks_that_nothing_connects(write: Write) -> None:
    run = write(("a", "a", "b"))
    path = run / "trace" / "stage-2.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "Gradient" not in line))
    with pytest.raises(TraceError, match="clocks of stages 1 and 2, on different machines, cannot be aligned"):
        merged(read(run))


def test_every_message_has_both_ends(write: Write) -> None:
    timeline = merged(read(write(batches=5)))
    assert len(timeline.flows) == 2 * 2 * 5 and timeline.alone == 0
    assert sorted(flow[:3] + flow[4:5] for flow in timeline.flows if flow.batch == 3) == [
        ("Activation", 3, 0, 1),
        ("Activation", 3, 1, 2),
        ("Gradient", 3, 1, 0),
        ("Gradient", 3, 2, 1),
    ]
    assert all(flow.received - flow.sent == pytest.approx(DELAY / 1e3) for flow in timeline.flows)


def test_messages_of_one_batch_and_type_are_joined_in_order(tmp_path: Path) -> None:
    """Two reports behind the same batch; a third was still under way when the trace ended."""
    for stage, way, times in ((0, RECEIVED, (2.0, 4.0)), (1, SENT, (1.0, 3.0, 5.0))):
        trace = Trace(tmp_path / "trace" / f"stage-{stage}.jsonl", stage, 2)
        trace.span("report", 0.0, 6.0, 0)
        for at in times:
            trace.message(way, 1 - stage, "Report", 9, at)
        trace.close()
    timeline = merged(read(tmp_path))
    assert [(flow.sent, flow.received) for flow in timeline.flows] == [(1, 2), (3, 4)] and timeline.alone == 1


# -- the part that is looked at ----------------------------------------------------------------------------------


def extent(timeline: Timeline) -> tuple[float, float]:
    """Milliseconds on the scale of conftest's drawing: batch n is at 40 n."""
    return 40 + 1e3 * timeline.begin, 40 + 1e3 * timeline.end


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (None, None, (40, 30 * 40 + 36.5)),
        ("5", None, (5 * 40, 30 * 40 + 36.5)),
        ("5", "7", (5 * 40, 7 * 40 + 23)),  # the last stage's answer to 7 is sent
        (None, "7", (40, 7 * 40 + 23)),
        ("0.1205s", "0.161s", (160.5, 201)),  # in the middle of the forwards of batches 4 and 5, which are cut
    ],
)
def test_a_part_is_cut_out(write: Write, begin: str | None, end: str | None, expected: tuple[float, float]) -> None:
    part = cut(merged(read(write())), begin, end)
    assert extent(part) == pytest.approx(expected)
    assert all(part.begin <= flow.sent <= flow.received <= part.end for flow in part.flows) and part.flows


@pytest.mark.parametrize(
    ("begin", "end", "error", "says"),
    [
        ("31", None, TraceError, "batch 31 is not in the trace, which has batches 1 to 30"),
        (None, "0", TraceError, "batch 0 is not in the trace"),
        ("9", "8", TraceError, "nothing is in the trace between"),
        ("100s", None, TraceError, "nothing is in the trace between"),
        ("x", None, UsageError, "take a batch id, as 100, or seconds since the trace began, as 1.5s, not x"),
        (None, "ms", UsageError, "not ms"),
    ],
)
def test_a_part_that_is_not_there(
    write: Write, begin: str | None, end: str | None, error: type[DnipipeError], says: str
) -> None:
    with pytest.raises(error, match=says):
        cut(merged(read(write())), begin, end)


def test_a_batch_behind_the_end_of_stage_0s_trace(write: Write) -> None:
    """Its file was full before that of the last stage was."""
    whole = merged(read(write(batches=30)))
    first = whole.stages[0]
    ended = replace(first, spans=[span for span in first.spans if span.batch <= 10])
    short = replace(whole, stages=[ended, *whole.stages[1:]])
    with pytest.raises(TraceError, match=r"^batch 15 is not in the trace of stage 0, which ends at batch 10: give sec"):
        cut(short, "15", None)
    assert extent(cut(short, "10", "10"))[0] == pytest.approx(400)
    assert extent(some_batches(short)) == pytest.approx((40, 10 * 40 + 23))


def test_some_batches_are_from_the_middle(write: Write) -> None:
    assert extent(some_batches(merged(read(write(batches=101))))) == pytest.approx((41 * 40, 60 * 40 + 23))
    assert extent(some_batches(merged(read(write(batches=3))))) == pytest.approx((40, 3 * 40 + 23))


# -- for Perfetto ------------------------------------------------------------------------------------------------


def test_the_file_for_perfetto_is_valid(write: Write, tmp_path: Path) -> None:
    write_chrome(merged(read(write())), tmp_path / "trace.json")
    assert_valid(json.loads((tmp_path / "trace.json").read_text())["traceEvents"], stages=3)


def assert_valid(events: list[chrome.Event], stages: int) -> None:
    """Names for each process; in order of time; spans disjoint; an arrow has two ends, each within a span."""
    named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert named == {k: f"stage {k}" for k in range(stages)}
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times) and times[0] == 0
    spans = {k: [event for event in events if event["ph"] == "X" and event["pid"] == k] for k in range(stages)}
    for mine in spans.values():
        assert mine and all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in itertools.pairwise(mine))
    begun = {event["id"]: event for event in events if event["ph"] == "s"}
    ended = {event["id"]: event for event in events if event["ph"] == "f"}
    assert begun.keys() == ended.keys() and len(begun) + len(ended) == sum(event["ph"] in "sf" for event in events)
    for number, event in begun.items():
        end = ended[number]
        assert abs(event["pid"] - end["pid"]) == 1 and event["ts"] <= end["ts"] and event["args"] == end["args"]
        assert around(spans[event["pid"]], event["ts"]) in ("send", "serialize")
        assert around(spans[end["pid"]], end["ts"]) == "receive"


def around(spans: list[chrome.Event], at: float) -> str | None:
    return next((str(span["name"]) for span in spans if span["ts"] <= at < span["ts"] + span["dur"]), None)
