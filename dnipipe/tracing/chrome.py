"""A timeline in the trace event format, which Perfetto and Chrome open: a process a stage, an arrow a message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnipipe.tracing.merging import Timeline

Event = dict[str, Any]


def write_chrome(timeline: Timeline, path: Path) -> None:
    """One JSON file, an event a line."""
    with path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        file.write(",\n".join(map(json.dumps, events(timeline))))
        file.write("\n]}\n")


def events(timeline: Timeline) -> list[Event]:
    """Names first, then what happened, in order of time."""
    happened = [*_spans(timeline), *_arrows(timeline)]
    return [*_names(timeline), *sorted(happened, key=lambda event: float(event["ts"]))]


def _names(timeline: Timeline) -> Iterator[Event]:
    for trace in timeline.stages:
        here = {"ph": "M", "pid": trace.stage, "tid": 0}
        yield here | {"name": "process_name", "args": {"name": f"stage {trace.stage}"}}
        yield here | {"name": "process_sort_index", "args": {"sort_index": trace.stage}}
        yield here | {"name": "thread_name", "args": {"name": "worker"}}


def _spans(timeline: Timeline) -> Iterator[Event]:
    for trace in timeline.stages:
        for name, begin, end, batch in trace.spans:
            event = {"ph": "X", "name": name, "cat": "span", "pid": trace.stage, "tid": 0, "ts": _us(begin)}
            yield event | {"dur": round(_us(end) - _us(begin), 3), "args": {"batch": batch} if batch else {}}


def _arrows(timeline: Timeline) -> Iterator[Event]:
    for number, flow in enumerate(timeline.flows):
        event = {"name": flow.kind, "cat": "message", "id": number, "tid": 0, "args": {"batch": flow.batch}}
        yield event | {"ph": "s", "pid": flow.sender, "ts": _us(flow.sent)}
        yield event | {"ph": "f", "bp": "e", "pid": flow.receiver, "ts": _us(flow.received)}  # e: the span around it


def _us(seconds: float) -> float:
    """The format's unit."""
    return round(seconds * 1e6, 3)


__all__ = ["events", "write_chrome"]
