"""What is searched, and what is raced: tasks, systems, and how each system gets its best settings for a link.

probe    real processes over the link, a few batches   ─► seconds a sample, and by how many batches a gradient is late
search   the laboratory, late by as much, each rate    ─► samples to the target      the loss by samples knows no link
choice   the least of (samples × seconds a sample)     ─► race: real processes over the link, to the target
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.cells import Cell, Record, Records

STAGES = 2
UNIT = 8  # samples in whose time the map counts a round trip
LATE = (0, 1, 2, 4, 16, 64)  # batches a hop in the laboratory; what the links make goes to the nearest
SYNC = "sync"
DECOUPLED = {
    "blend": ("--rule.name", "blend"),
    "synthetic": ("--rule.name", "synthetic"),
    "local": ("--rule.name", "local"),
    "delayed-4": ("--rule.name", "delayed", "--rule.accumulate", "4"),
}
ACCUMULATED = {"delayed-4": 4}  # batches an update; of the others 1
SYSTEMS = (SYNC, *DECOUPLED)
Split = tuple[str, int]  # of rule.name = sync: the schedule, and M
SPLITS: tuple[Split, ...] = (
    ("1f1b", 2),
    ("1f1b", 4),
    ("1f1b", 8),
    ("gpipe", 2),
    ("gpipe", 4),
    ("gpipe", 8),
)  # all learn the same: a probe chooses
NO_SPLIT: Split = ("", 0)
Curve = list[tuple[float, float]]  # samples or seconds, and the validation loss there


def splits(batch: int) -> list[Split]:
    """Those that leave a micro-batch more than one sample, which batch norm needs."""
    return [split for split in SPLITS if split[1] < batch]


@dataclass(frozen=True)
class Task:
    """Args:
    config: what all its runs have in common.
    data: data.name.
    rates: samples a batch -> learning rates that are tried, as many for each: larger batches want larger ones.
    boundary: first layer of stage 1.
    batches: samples between two updates of dnipipe and of a synchronous pipeline.
    samples: of a search run. target: samples after which backprop's best loss is the target.
    every: samples between evaluations.
    """

    config: str
    data: str
    rates: Mapping[int, tuple[str, ...]]
    boundary: int = 2
    batches: tuple[int, ...] = (8, 32, 128)
    samples: int = 10240
    target: int = 6144
    every: int = 1024

    def quick(self) -> Task:
        """The same with one setting a system and few samples: it shows that all works, and compares nothing."""
        one = replace(self, rates={32: self.rates[32][:1]}, batches=(32,))
        return replace(one, samples=1024, target=512, every=256)


TASKS = {
    "lm": Task(
        "benchmarks/time_to_loss/lm.toml",
        "text",
        {8: ("1.5e-3", "3e-3", "6e-3"), 32: ("3e-3", "6e-3", "1.2e-2"), 128: ("6e-3", "1.2e-2", "2.4e-2")},
    ),
    "mnist": Task(
        "benchmarks/time_to_loss/mnist.toml",
        "mnist",
        {8: ("3e-4", "1e-3", "3e-3"), 32: ("1e-3", "3e-3", "1e-2"), 128: ("3e-3", "1e-2", "3e-2")},
    ),
}


@dataclass(frozen=True)
class Setting:
    """How a system trains: samples a batch, learning rate, and of `sync` the schedule and its M micro-batches."""

    batch: int
    rate: str
    split: Split = NO_SPLIT

    def __str__(self) -> str:
        schedule, number = self.split
        cut = f", {schedule} with M = {number}" if schedule else ""
        return f"lr {self.rate}, batch {self.batch}{cut}"


def words(task: Task, system: str, setting: Setting, samples: int, seed: int = 0) -> tuple[str, ...]:
    """Settings of a run over processes, of so many samples."""
    batch = setting.batch
    own: tuple[str, ...] = DECOUPLED.get(system, ())
    if system == SYNC:
        schedule, number = setting.split
        own = ("--rule.name", SYNC, "--sync.schedule", schedule, "--sync.microbatches", str(number))
    return (
        *own,
        *("--pipeline.stages", str(STAGES), "--pipeline.boundaries", str(task.boundary)),
        *("--data.batch", str(batch), "--optimizer.lr", setting.rate, "--train.seed", str(seed)),
        *("--train.batches", str(math.ceil(samples / batch)), "--eval.every", str(max(1, task.every // batch))),
    )


def search(name: str, task: Task, system: str, late: int) -> Iterator[Cell]:
    """The runs that tell what a system needs to the target: one a batch and rate. Backprop: one process, one stage."""
    for batch in task.batches:
        for rate in task.rates[batch]:
            labels = {"system": system, "late": late, "batch": batch, "rate": rate}
            yield Cell(name, labels, task.config, _laboratory(task, system, Setting(batch, rate), late))


def _laboratory(task: Task, system: str, setting: Setting, late: int) -> tuple[str, ...]:
    given = words(task, system, setting, task.samples)
    if system != SYNC:
        return (*given, "--transport.kind", "local", "--transport.delay", str(late))
    behind = given[given.index("--data.batch") :]
    return ("--rule.name", "wait", "--pipeline.stages", "1", *behind, "--transport.kind", "local")


def lateness(system: str, delay: float, batch_seconds: float, staleness: float) -> int:
    """Batches a hop, of LATE. No gradient counts for `local`, and none is late for `sync`.

    Half of what a gradient is late by without a delay, for it and its activation have a hop each; and the one-way delay
    over a batch's time.

    Args:
        staleness: updates, without a delay.
    """
    if system in (SYNC, "local"):
        return 0
    hop = staleness * ACCUMULATED.get(system, 1) / 2 + delay / batch_seconds
    return min(LATE, key=lambda late: abs(late - hop))


def curve(record: Record) -> Curve:
    """(samples, loss) of a search run; an evaluation that is not finite ends it."""
    batch = record.settings["data.batch"]
    return [(at * batch, loss) for at, loss, _ in record.evaluations]


def reached(line: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a curve first comes to the target, between two evaluations by a straight line. None: never."""
    for before, (x, loss) in zip([None, *line], line, strict=False):
        if loss <= target:
            if before is None or before[1] <= loss:
                return x
            return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - loss)
    return None


def loss_at(line: Curve, samples: float) -> float:
    """The lowest loss up to so many samples; infinite without an evaluation."""
    return min((loss for x, loss in line if x <= samples), default=math.inf)


def target(name: str, task: Task, records: Records) -> float | None:
    """The lowest loss of backprop's search runs after `task.target` samples. None: one of them is missing."""
    found = [records.of(cell) for cell in search(name, task, SYNC, 0)]
    if any(record is None for record in found):
        return None
    return min(loss_at(curve(record), task.target) for record in found if record is not None)


def needed(record: Record | None, loss: float) -> float | None:
    """Samples to that loss. None: not run, or never."""
    return None if record is None else reached(curve(record), loss)


def best(cells: Iterable[tuple[Cell, float]], records: Records, loss: float) -> tuple[Cell, float] | None:
    """The cell with the fewest seconds, and these, by (cell, seconds a sample). None: none comes to the loss."""
    known = [(cell, samples * pace) for cell, pace in cells if (samples := needed(records.of(cell), loss)) is not None]
    return min(known, key=lambda pair: pair[1], default=None)
