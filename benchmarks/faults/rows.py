"""The table of faults: each on a pipeline of its own, again and again, and a row of what became of it."""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.emulator import ETHERNET, Emulator, Link, missing
from benchmarks.faults import attacks, clocks, disks, network, processes, witness
from benchmarks.faults.events import Event, detected, noticed, recovered, spread
from benchmarks.faults.pipeline import Hung, Pipeline, wrong
from benchmarks.figures import processor
from benchmarks.grid import cores

WARM = 20  # batches that every stage has trained before the first fault
START = 240.0  # seconds until then: a machine that is busy
SETTLE = 400  # batches behind the last fault, until the loss is taken

Make = Callable[[Pipeline, int, random.Random], Event]


def nothing() -> str:
    return ""


@dataclass(frozen=True)
class Fault:
    """A row.

    Args:
        make: makes it once. amount: how often, in ten minutes; 0: by chance, about 40 times, whatever goes on.
        lacks: what this machine lacks for it. hosts: the stages are hosts of their own.
        small: the stages' folders are small file systems. stepping: their clocks can be set. quiet: no stage may be
            taken for gone. attack: somebody sits on the links. locked: with keys. hung, silence: settings, seconds.
        known: "loss" or "memory" -> why it is not that of undisturbed runs, where the reason is known.
    """

    make: Make
    amount: int
    lacks: Callable[[], str] = nothing
    hosts: bool = False
    small: bool = False
    stepping: bool = False
    quiet: bool = False
    attack: bool = False
    locked: bool = False
    hung: float = 6.0
    silence: float = 2.0
    known: dict[str, str] = field(default_factory=dict)


@dataclass
class Row:
    """What became of a fault. Times in seconds, memory in bytes."""

    fault: str
    amount: int = 0
    skipped: str = ""  # why it was not made
    hung: str = ""  # what did not happen
    found: int = 0  # how often a neighbour took the stage for gone, or an attack was noticed
    detected: dict[str, float] = field(default_factory=dict)
    recovered: dict[str, float] = field(default_factory=dict)
    open: int = 0  # faults behind which a stage made no progress
    wrong: list[str] = field(default_factory=list)  # in the ledgers
    batches: list[int] = field(default_factory=list)  # begun, by stage
    undone: list[int] = field(default_factory=list)  # begun, and lost with what they taught
    alone: list[int] = field(default_factory=list)  # trained without the next stage
    loss: tuple[int, float] | None = None  # the batch that it stands behind, nats a byte
    peak: list[int] = field(default_factory=list)
    left: int = 0
    delivered: int | None = None  # messages that no neighbour had sent; None: not measured
    kept_out: dict[str, int] = field(default_factory=dict)  # messages and connections not let in, by reason
    stages: int = 0
    load: float = 0.0  # processes at work on the machine before
    machine: str = ""
    date: str = ""

    @property
    def sound(self) -> bool:
        """Nothing hung, nothing is unaccounted for, nothing was delivered that nobody sent, and nobody was taken for
        gone who was only slow. Loss and memory are not judged here (report.py)."""
        mistaken = FAULTS[self.fault].quiet and self.found
        return not (self.hung or self.open or self.wrong or self.left or self.delivered or mistaken)


FAULTS: dict[str, Fault] = {
    "kill -9": Fault(processes.kill, 0),
    "SIGSTOP for 0.5 to 10 s": Fault(processes.stop, 30),
    "hang": Fault(processes.ordered("hang"), 10),
    "hang with the interpreter's lock": Fault(processes.ordered("hang with the interpreter's lock"), 10),
    "exception in forward": Fault(processes.ordered("exception"), 10),
    "segmentation fault": Fault(processes.ordered("segmentation fault"), 10),
    "out of memory": Fault(
        processes.out_of_memory,
        10,
        processes.no_groups,
        known={"memory": "the fault itself is to take all the memory there is"},
    ),
    "SIGTERM": Fault(processes.ask_to_end, 20),
    "second process of a stage": Fault(processes.second_process, 10),
    "stopped, replaced, wakes up": Fault(processes.replaced_asleep, 5, hung=60.0),
    "partition for 0.2 to 10 s": Fault(network.partition, 15, hosts=True),
    "partition one way": Fault(network.one_way, 15, hosts=True),
    "power loss for 0.2 to 10 s": Fault(network.power_loss, 15, hosts=True),
    "connections reset": Fault(network.reset, 10, network.no_reset, hosts=True),
    "20 % loss for 60 s": Fault(network.slow(Link(loss=0.2), 60), 1, hosts=True, quiet=True, silence=10.0),
    "50 ± 10 ms for 60 s": Fault(network.slow(Link(delay=0.04, jitter=0.02), 60), 1, hosts=True, quiet=True),
    "1 Mbit/s for 60 s": Fault(network.slow(Link(rate=1e6), 60), 1, hosts=True, quiet=True),
    "disk full for 1 to 5 s": Fault(disks.full, 10, disks.no_mount, small=True),
    "I/O error for 3 s": Fault(disks.failing_sync, 5, disks.no_strace),
    "kill -9 while saving": Fault(
        disks.kill_while_saving,
        20,
        known={"loss": "kills hit one stage after another within seconds, so the last one has half of the batches"},
    ),
    "own state damaged": Fault(disks.damaged, 20),
    "clock steps of ± 288 s": Fault(clocks.step, 15, clocks.no_library, stepping=True, quiet=True),
    "bit flipped": Fault(attacks.flip, 30, attack=True),
    "bit flipped, with keys": Fault(attacks.flip, 30, attack=True, locked=True),
    "recorded bytes again": Fault(attacks.replay, 15, attack=True),
    "recorded bytes again, with keys": Fault(attacks.replay, 15, attack=True, locked=True),
    "wrong, missing or revoked key": Fault(attacks.wrong_key, 15, attack=True, locked=True),
    "stale incarnation with its key": Fault(attacks.stale, 10, attack=True, locked=True),
    "oversize frame": Fault(attacks.oversize, 10, attack=True),
    "message of 300,000 frames": Fault(
        attacks.many_frames,
        10,
        attack=True,
        known={"memory": "libzmq holds the frames of a message until the last of them is there"},
    ),
    "flood of malformed frames for 5 s": Fault(
        attacks.flood,
        10,
        attack=True,
        known={"memory": "libzmq holds a queue of them, some of very many frames; ten floods take no more than two"},
    ),
    "100 half-open connections": Fault(attacks.half_open, 10, attacks.no_repair, attack=True),
    "400 silent connections, 128 files": Fault(attacks.idle, 10, attack=True),
}


def measure(name: str, stages: int, minutes: float, rate: float, seed: int) -> Row:
    """One row: that fault on a pipeline of its own, for so long or so often."""
    fault = FAULTS[name]
    if lack := fault.lacks() or (missing() if fault.hosts else ""):
        return Row(name, skipped=f"needs more than this machine has: {lack}")
    machine = f"{len(cores())} cores of {processor()}"
    row = Row(name, stages=stages, load=os.getloadavg()[0], machine=machine, date=date.today().isoformat())
    rng, events = random.Random(seed), list[Event]()
    with _pipeline(fault, stages, rate) as pipeline:
        try:
            pipeline.until_all_pass(WARM, START)
            for event in _made(fault, pipeline, minutes, rng):
                events.append(event)
            pipeline.until_all_pass(pipeline.last())
            row.loss = _settled(pipeline)
        except Hung as error:
            row.hung = str(error)
        pipeline.close()
        _account(row, pipeline, events)
    return row


def _account(row: Row, pipeline: Pipeline, events: list[Event]) -> None:
    """What the ledgers say, now that nothing is written any more."""
    accounts = pipeline.accounts()
    row.amount, row.wrong, row.peak, row.left = len(events), wrong(accounts), pipeline.peak, pipeline.left
    row.batches = [len(account.begun) for account in accounts]
    row.undone = [account.undone for account in accounts]
    row.alone = [len(account.alone) for account in accounts]
    ends = [*(event.begin for event in events[1:]), time.time()]
    if FAULTS[row.fault].quiet:
        events = [Event(stage, event.begin, event.end) for event in events for stage in range(pipeline.stages)]
        ends = [event.end for event in events]
    testimonies = pipeline.testimonies()
    row.delivered, row.kept_out = witness.strange(testimonies), witness.reasons(testimonies)
    if FAULTS[row.fault].attack:
        times = [time for stage in testimonies for time, _, _ in stage.kept_out]
        seen = [noticed(event, accounts, times, end) for event, end in zip(events, ends, strict=False)]
    else:
        seen = [detected(event, accounts, end) for event, end in zip(events, ends, strict=False)]
    back = [recovered(event, accounts) for event in events]
    row.found, row.open = sum(one is not None for one in seen), sum(one is None for one in back)
    row.detected = spread([one for one in seen if one is not None])
    row.recovered = spread([one for one in back if one is not None])


def undisturbed(stages: int, seed: int, batches: int) -> tuple[dict[int, float], list[int]]:
    """Of a run that nothing happens to: the losses by the batch that they stand behind, the peaks of memory by stage.

    Raises Hung.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dnipipe-faults-") as folder,
        Pipeline(Path(folder) / "pipeline", stages, seed=seed, batches=batches) as pipeline,
    ):
        ends = pipeline.supervisors.values()
        pipeline.until("the run ends", lambda: all(one.poll() is not None for one in ends), limit=batches)
        return pipeline.losses(), pipeline.peak


@contextlib.contextmanager
def _pipeline(fault: Fault, stages: int, rate: float) -> Iterator[Pipeline]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dnipipe-faults-")))
        emulator = stack.enter_context(Emulator(stages, mtu=ETHERNET)) if fault.hosts else None
        options: dict[str, Any] = {"locked": fault.locked, "cabled": fault.attack}
        options |= {"hung": fault.hung, "silence": fault.silence}
        pipeline = Pipeline(folder / "pipeline", stages, rate, emulator, **options)
        if fault.small:
            disks.mounted(pipeline)
            stack.callback(disks.unmounted, pipeline)
        if fault.stepping:
            clocks.prepared(pipeline)
        yield stack.enter_context(pipeline)


def _made(fault: Fault, pipeline: Pipeline, minutes: float, rng: random.Random) -> Iterator[Event]:
    if not fault.amount:
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            time.sleep(rng.expovariate(40 / 600))
            yield fault.make(pipeline, rng.randrange(pipeline.stages), rng)
        return
    for _ in range(math.ceil(fault.amount * minutes / 10)):
        yield fault.make(pipeline, rng.randrange(pipeline.stages), rng)
        pipeline.until_all_pass(pipeline.last())
        time.sleep(rng.uniform(1, 3))


def _settled(pipeline: Pipeline) -> tuple[int, float]:
    """An evaluation some batches behind the last fault."""
    behind = pipeline.last() + SETTLE
    pipeline.until("an evaluation", lambda: max(pipeline.losses(), default=0) >= behind, limit=300)
    return max(pipeline.losses().items())
