"""The part of a timeline that is looked at: from a batch or a moment to another."""

from __future__ import annotations

from dataclasses import replace

from dnipipe.errors import TraceError, UsageError
from dnipipe.tracing.merging import Timeline

SOME = 20  # batches that a picture shows well


def cut(timeline: Timeline, begin: str | None, end: str | None) -> Timeline:
    """What was going on from `begin` to `end`, each a batch id ("100"), or seconds ("1.5s"); None: no limit.

    From when stage 0 began with the one batch, to when the last stage was through with the other. Raises UsageError
    for what is neither, TraceError if nothing lies there.
    """
    since, until = timeline.begin, timeline.end
    if begin is not None:
        since = _seconds(begin) if begin.endswith("s") else begin_of(timeline, _batch(begin))
    if end is not None:
        until = _seconds(end) if end.endswith("s") else end_of(timeline, _batch(end))
    return between(timeline, since, until)


def some_batches(timeline: Timeline) -> Timeline:
    """SOME from the middle of what both ends have: what a picture shows if nobody said what."""
    first, last = batches(timeline)
    last = max(first, min(last, max((span.batch for span in timeline.stages[0].spans), default=last)))
    middle = (first + last) // 2
    begin, end = max(first, middle - SOME // 2), min(last, middle + SOME // 2 - 1)
    return between(timeline, begin_of(timeline, begin), end_of(timeline, end))


def between(timeline: Timeline, begin: float, end: float) -> Timeline:
    """What was going on between the two, seconds: spans are cut there, messages have both ends there."""
    stages = [
        replace(
            trace,
            spans=[
                span._replace(begin=max(begin, span.begin), end=min(end, span.end))
                for span in trace.spans
                if span.end > begin and span.begin < end
            ],
        )
        for trace in timeline.stages
    ]
    if not any(trace.spans for trace in stages):
        raise TraceError(f"nothing is in the trace between {begin:.3f} and {end:.3f} s")
    flows = [flow for flow in timeline.flows if begin <= flow.sent and flow.received <= end]
    return replace(timeline, stages=stages, flows=flows)


def batches(timeline: Timeline) -> tuple[int, int]:
    """The first and the last batch that went through the last stage. Raises TraceError if none did."""
    ids = [span.batch for span in timeline.stages[-1].spans if span.batch]
    if not ids:
        raise TraceError("no batch went through all stages while the trace was written")
    return min(ids), max(ids)


def begin_of(timeline: Timeline, batch: int) -> float:
    """When stage 0 began with it, seconds. Raises TraceError if it is not in the trace."""
    _check(timeline, batch)
    begins = [span.begin for span in timeline.stages[0].spans if span.batch >= batch]
    if not begins:
        last = max((span.batch for span in timeline.stages[0].spans), default=0)
        raise TraceError(
            f"batch {batch} is not in the trace of stage 0, which ends at batch {last}: give seconds, as 1.5s, instead"
        )
    return min(begins)


def end_of(timeline: Timeline, batch: int) -> float:
    """When the last stage was through with it, seconds. Raises TraceError if it is not in the trace."""
    _check(timeline, batch)
    return max(span.end for span in timeline.stages[-1].spans if 0 < span.batch <= batch)


def _check(timeline: Timeline, batch: int) -> None:
    first, last = batches(timeline)
    if not first <= batch <= last:
        raise TraceError(f"batch {batch} is not in the trace, which has batches {first} to {last}")


def _seconds(text: str) -> float:
    try:
        return float(text.removesuffix("s"))
    except ValueError:
        raise _unreadable(text) from None


def _batch(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _unreadable(text) from None


def _unreadable(text: str) -> UsageError:
    return UsageError(f"--from and --to take a batch id, as 100, or seconds since the trace began, as 1.5s, not {text}")


__all__ = ["batches", "begin_of", "between", "cut", "end_of", "some_batches"]
