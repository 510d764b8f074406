"""Faults of a host's clock, which steps while the stage runs. The real one stays: libfaketime tells the stages another.

What a stage waits for goes by the monotonic clock, which never steps; the clock of the wall is for what people read.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from benchmarks.faults.events import Event
from benchmarks.faults.pipeline import Pipeline

STEP = 288  # seconds
LIBRARIES = Path("/usr/lib")


def step(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """For 5 s its clock is 288 s ahead, or behind: so it steps twice."""
    begin = time.time()
    _tell(pipeline, stage, rng.choice((STEP, -STEP)))
    time.sleep(5)
    _tell(pipeline, stage, 0)
    return Event(stage, begin, time.time())


def prepared(pipeline: Pipeline) -> None:
    """Each stage asks libfaketime for the time, before it begins: none of it is cached, and no file's is changed."""
    for stage in range(pipeline.stages):
        _tell(pipeline, stage, 0)
        pipeline.environment[stage] = {
            "LD_PRELOAD": str(_library()),
            "FAKETIME_TIMESTAMP_FILE": str(_file(pipeline, stage)),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


def no_library() -> str:
    return "" if _library() else "libfaketime (Debian's package faketime)"


def _library() -> Path | None:
    return next(LIBRARIES.glob("*/faketime/libfaketimeMT.so.1"), None)


def _file(pipeline: Pipeline, stage: int) -> Path:
    return pipeline.folder / f"clock-{stage}"


def _tell(pipeline: Pipeline, stage: int, seconds: int) -> None:
    path = _file(pipeline, stage)
    path.with_suffix(".new").write_text(f"{seconds:+d}\n")
    path.with_suffix(".new").replace(path)
