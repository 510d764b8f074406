"""Faults of the network between stages that are hosts of their own (benchmarks/emulator.py)."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable

from benchmarks.emulator import Emulator, Link
from benchmarks.faults.events import Event
from benchmarks.faults.pipeline import Pipeline

Fault = Callable[[Pipeline, int, random.Random], Event]


def partition(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """For 0.2 to 10 s the stage reaches nobody, and nobody reaches it."""
    return _cut(pipeline, stage, _both_ways(pipeline, stage), rng)


def power_loss(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """The same, and its process is killed meanwhile: the others have connections whose other end is no more."""
    _emulator(pipeline).cut = _both_ways(pipeline, stage)
    pipeline.signal(stage, signal.SIGKILL)
    return partition(pipeline, stage, rng)


def one_way(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """For 0.2 to 10 s the stage hears the others and is not heard, or the other way round."""
    others = [host for host in range(pipeline.stages) if host != stage]
    out = rng.random() < 0.5
    return _cut(pipeline, stage, {(stage, k) if out else (k, stage) for k in others}, rng)


def _both_ways(pipeline: Pipeline, stage: int) -> frozenset[tuple[int, int]]:
    others = [host for host in range(pipeline.stages) if host != stage]
    return frozenset([*((stage, host) for host in others), *((host, stage) for host in others)])


def _cut(pipeline: Pipeline, stage: int, pairs: Iterable[tuple[int, int]], rng: random.Random) -> Event:
    emulator = _emulator(pipeline)
    begin = time.time()
    emulator.cut = frozenset(pairs)
    time.sleep(rng.uniform(0.2, 10))
    emulator.cut = frozenset()
    return Event(stage, begin, time.time())


def reset(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """For 0.2 s the stage's host answers every packet by TCP's RST."""
    rule = ["INPUT", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"]
    within = [*_emulator(pipeline).within(stage), "iptables"]
    begin = time.time()
    subprocess.run([*within, "-A", *rule], check=True)
    time.sleep(0.2)
    subprocess.run([*within, "-D", *rule], check=True)
    return Event(stage, begin, time.time())


def no_reset() -> str:
    """Why no connection can be reset here; "" if it can."""
    return "" if shutil.which("iptables") else "the command iptables is missing"


def slow(link: Link, seconds: float) -> Fault:
    """Every link is like this for so long. No stage is dead meanwhile."""

    def fault(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
        emulator = _emulator(pipeline)
        begin, emulator.link = time.time(), link
        time.sleep(seconds)
        emulator.link = Link()
        return Event(stage, begin, time.time())

    return fault


def _emulator(pipeline: Pipeline) -> Emulator:
    assert pipeline.emulator is not None
    return pipeline.emulator
