"""The files of a trace as values, each line checked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dnipipe.errors import TraceError
from dnipipe.tracing.writer import FORMAT, RECEIVED, SENT


class Span(NamedTuple):
    """What a stretch of a stage's time was spent on."""

    name: str
    begin: float  # seconds
    end: float
    batch: int  # id of the training batch, 0: none


class Passed(NamedTuple):
    """A message as one of its two ends saw it."""

    way: str  # SENT or RECEIVED
    peer: int  # the neighbour, stage k-1 or k+1
    kind: str  # Activation, Gradient, …
    batch: int
    at: float  # seconds


@dataclass
class StageTrace:
    """One stage's file. Within `spans` and within `messages` time does not go back."""

    stage: int
    clock: str  # which clock the times are of
    spans: list[Span] = field(default_factory=list)
    messages: list[Passed] = field(default_factory=list)
    dropped: int = 0  # lines that the stage did not write, for the file was full
    ended: bool = False  # False: the process was killed, or still runs


def read(run: Path) -> list[StageTrace]:
    """The traces of stages 0 to K-1. Raises TraceError for what is missing or damaged; a last line may be cut off."""
    folder = run / "trace"
    if not (folder / "stage-0.jsonl").exists():
        raise TraceError(f"{run} holds no trace: train with --output.trace true")
    _, stages = _header(folder / "stage-0.jsonl", 0)
    return [_read(folder / f"stage-{stage}.jsonl", stage, stages) for stage in range(stages)]


def _header(path: Path, stage: int) -> tuple[str, int]:
    """(clock, K) of the file of that stage."""
    try:
        with path.open() as file:
            header = json.loads(file.readline())
        known = header["trace"] == FORMAT and header["stage"] == stage
        clock, stages = str(header["clock"]), int(header["stages"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TraceError(f"cannot read the trace {path}: {error}; train again with --output.trace true") from None
    if not known:
        raise TraceError(f"{path} does not begin as the trace of stage {stage}, format {FORMAT}: {header}")
    return clock, stages


def _read(path: Path, stage: int, stages: int) -> StageTrace:
    clock, own_stages = _header(path, stage)
    if own_stages != stages:
        raise TraceError(f"{path} is of a run of {own_stages} stages, that of stage 0 of one of {stages}")
    found = StageTrace(stage, clock)
    with path.open() as file:
        next(file)
        for number, line in enumerate(file, start=2):
            if not line.endswith("\n"):  # killed while it wrote
                break
            try:
                _add(found, json.loads(line))
            except (ValueError, LookupError, TypeError):
                raise TraceError(f"{path} is damaged: line {number} is {line[:60]!r}") from None
    return found


def _add(found: StageTrace, value: Any) -> None:
    """Raises ValueError, LookupError or TypeError for what is no line of a trace, or not in order."""
    if isinstance(value, dict):
        found.dropped, found.ended = int(value["dropped"]), True
    elif value[0] in (SENT, RECEIVED):
        way, peer, kind, batch, at = value
        if abs(int(peer) - found.stage) != 1:
            raise ValueError("not a neighbour")
        found.messages.append(Passed(way, peer, str(kind), int(batch), at / 1e9))
    else:
        name, begin, end, batch = value
        if end < begin or (found.spans and begin / 1e9 < found.spans[-1].end):
            raise ValueError("time goes back")
        found.spans.append(Span(str(name), begin / 1e9, end / 1e9, int(batch)))
