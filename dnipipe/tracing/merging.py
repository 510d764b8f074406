"""The stages' traces as one timeline: their clocks aligned, each message's two ends joined.

    stage k    ──s1─────────r2──►      down  r1 − s1 = d + θ        θ = (min down − min up) / 2
    stage k+1  ─────r1──s2──────►      up    r2 − s2 = d − θ        what the clock of k+1 is ahead of that of k

As NTP does it: a message that had to wait took longer than d, so the fastest of each direction counts. What is wrong in
θ is at most half of what the fastest two differ by. Stages that read the same clock need none of this, nor get it. A
drift of clocks is not corrected: 10 millionths are 10 ms after 1000 s.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from dnipipe.errors import TraceError
from dnipipe.tracing.picture import Row
from dnipipe.tracing.reading import Passed, StageTrace
from dnipipe.tracing.writer import SENT


class Flow(NamedTuple):
    """A message, from where and when it was sent to where and when it was received."""

    kind: str
    batch: int
    sender: int  # stage
    sent: float  # seconds
    receiver: int
    received: float


@dataclass(frozen=True)
class Timeline:
    """All stages on one clock, whose zero is the first span's begin."""

    stages: Sequence[StageTrace]
    flows: Sequence[Flow]
    alone: int  # messages of which only one end is in the trace

    def rows(self) -> list[Row]:
        """Every span as `picture.draw` takes it."""
        return [(trace.stage, span.name, span.begin, span.end) for trace in self.stages for span in trace.spans]

    @property
    def begin(self) -> float:
        return min(trace.spans[0].begin for trace in self.stages if trace.spans)

    @property
    def end(self) -> float:
        return max(trace.spans[-1].end for trace in self.stages if trace.spans)

    def notes(self) -> Iterator[str]:
        """What is missing, for a person."""
        for trace in self.stages:
            if trace.dropped:
                yield f"stage {trace.stage}: {trace.dropped:,} later spans and messages did not fit in and are missing"
            if not trace.ended:
                yield f"stage {trace.stage}: its trace has no end, the process was killed or is still at work"
        if self.alone:
            yield f"{self.alone:,} messages have no arrow, for only one end of them is in the trace"


def merged(traces: Sequence[StageTrace]) -> Timeline:
    """One timeline of all stages. Raises TraceError if clocks cannot be aligned, or there is no span."""
    shifts = _shifts(traces)
    begins = [trace.spans[0].begin + shifts[trace.clock] for trace in traces if trace.spans]
    if not begins:
        raise TraceError("the trace is empty: the run ended before it began")
    stages = [_shifted(trace, shifts[trace.clock] - min(begins)) for trace in traces]
    flows = [flow for before, after in pairwise(stages) for flow in (*_flows(before, after), *_flows(after, before))]
    return Timeline(stages, flows, sum(len(trace.messages) for trace in traces) - 2 * len(flows))


def _shifted(trace: StageTrace, by: float) -> StageTrace:
    spans = [span._replace(begin=span.begin + by, end=span.end + by) for span in trace.spans]
    return replace(trace, spans=spans, messages=[each._replace(at=each.at + by) for each in trace.messages])


def _flows(sender: StageTrace, receiver: StageTrace) -> Iterator[Flow]:
    """An edge keeps order, so the n-th message of a kind and batch that was sent is the n-th that was received."""
    waiting: dict[tuple[str, int], deque[Passed]] = defaultdict(deque)
    for each in sender.messages:
        if each.way == SENT and each.peer == receiver.stage:
            waiting[each.kind, each.batch].append(each)
    for each in receiver.messages:
        if each.way != SENT and each.peer == sender.stage and waiting[each.kind, each.batch]:
            sent = waiting[each.kind, each.batch].popleft()
            yield Flow(each.kind, each.batch, sender.stage, sent.at, receiver.stage, each.at)


def _shifts(traces: Sequence[StageTrace]) -> dict[str, float]:
    """Seconds to add to what a clock said, so that all say what stage 0's does."""
    shifts = {traces[0].clock: 0.0}
    for before, after in pairwise(traces):
        if after.clock not in shifts:
            shifts[after.clock] = shifts[before.clock] - _ahead(before, after)
    return shifts


def _ahead(before: StageTrace, after: StageTrace) -> float:
    """θ: by how many seconds the clock of `after` is ahead."""
    down = [flow.received - flow.sent for flow in _flows(before, after)]
    up = [flow.received - flow.sent for flow in _flows(after, before)]
    if not down or not up:
        raise TraceError(
            f"the clocks of stages {before.stage} and {after.stage}, on different machines, cannot be aligned: the "
            "trace has no message that passed between them in each direction"
        )
    return (min(down) - min(up)) / 2


__all__ = ["Flow", "Timeline", "merged"]
