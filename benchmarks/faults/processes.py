"""Faults of one process: it is killed, stopped, hangs, crashes, runs out of memory, or is asked to end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.events import Event
from benchmarks.faults.pipeline import Hung, Pipeline

GROUPS = Path("/sys/fs/cgroup/memory")  # control groups, version 1

Fault = Callable[[Pipeline, int, random.Random], Event]  # makes it once at that stage, and returns when it has ended


def kill(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """kill -9, of a process that has just been started, too."""
    pipeline.until(f"stage {stage} has a process", lambda: pipeline.signal(stage, signal.SIGKILL))
    return _now(stage)


def stop(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """SIGSTOP for 0.5 to 10 s. It is not ended when it wakes, unless another has taken its place, or it is late."""
    pid = pipeline.pid(stage)
    assert pid is not None
    begin = time.time()
    os.kill(pid, signal.SIGSTOP)
    time.sleep(rng.uniform(0.5, 10))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    return Event(stage, begin, time.time())


def ordered(name: str) -> Fault:
    """One of victim.ORDERS, in the middle of a forward."""

    def fault(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
        begin = time.time()  # when it is taken is seen a moment late, and a neighbour may be quicker
        pipeline.order(stage, name)
        path = pipeline.run / f"stage-{stage}" / "order"
        pipeline.until(f"stage {stage} takes the order: {name}", lambda: not path.exists())
        return Event(stage, begin, time.time())

    return fault


def out_of_memory(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """It takes memory without end in a control group with a limit, where the kernel kills it."""
    pid = pipeline.pid(stage)
    assert pid is not None
    with _limited(pid, pipeline.peak[stage] + 2**27):
        begin = time.time()
        pipeline.order(stage, "out of memory")
        pipeline.until(f"stage {stage} is killed", lambda: not Path(f"/proc/{pid}").exists())
        return Event(stage, begin, time.time())


@contextmanager
def _limited(pid: int, limit: int) -> Iterator[None]:
    group = GROUPS / f"dnipipe-faults-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        group.rmdir()


def no_groups() -> str:
    """Why there is no group with a limit here; "" if there can be one."""
    return "" if os.access(GROUPS / "memory.limit_in_bytes", os.W_OK) else f"{GROUPS} cannot be written here"


def ask_to_end(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """SIGTERM to its supervisor, as an orchestrator does it; then the stage is started again."""
    supervisor = pipeline.supervisors[stage]
    event = _now(stage)
    supervisor.send_signal(signal.SIGTERM)
    supervisor.wait(30)
    if supervisor.returncode:
        raise AssertionError(f"stage {stage} was asked to end and ended with status {supervisor.returncode}")
    pipeline.start(stage)
    return event


def second_process(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """A second one of the stage is started in the same folder: the first must end, and write nothing more."""
    begin, older = time.time(), pipeline.supervisors[stage]
    pipeline.extra.append(older)
    pipeline.start(stage)
    pipeline.until(f"the older stage {stage} ends", lambda: older.poll() is not None)
    return Event(stage, begin, time.time())


def replaced_asleep(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """The last stage, for it listens nowhere: SIGSTOP, a second process of it is started, trains, and the first wakes.
    It must end as one that was replaced does, and write nothing more."""
    stage = pipeline.stages - 1
    pid, older, before = pipeline.pid(stage), pipeline.supervisors[stage], pipeline.last()
    assert pid is not None
    event = _now(stage)
    os.kill(pid, signal.SIGSTOP)
    pipeline.extra.append(older)
    pipeline.start(stage)
    pipeline.until(f"the newer stage {stage} trains", lambda: pipeline.begun(stage) > before)
    os.kill(pid, signal.SIGCONT)
    pipeline.until(f"the older stage {stage} ends", lambda: older.poll() is not None)
    if older.returncode:
        raise Hung(f"the older stage {stage} ended with status {older.returncode}: it was not fenced")
    return event


def _now(stage: int) -> Event:
    now = time.time()
    return Event(stage, now, now)
