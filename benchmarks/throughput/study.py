"""What is measured: which systems, under which conditions, and in which order.

for each number of stages and link   first, for each synchronous schedule: its best number of micro-batches
  for each repeat                    the limit (each stage alone) and all systems, one after the other, beginning with
                                     another one each time: so that the machine's drift hits the limit too
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.emulator import Link
from benchmarks.figures import processor
from benchmarks.grid import cores
from benchmarks.throughput.places import Place
from benchmarks.throughput.rank import Order
from benchmarks.throughput.window import Measured
from benchmarks.throughput.workload import FEATURES

ALONE = "alone"
SCHEDULES = ("1f1b", "gpipe", "interleaved", "plain")  # of torch.distributed.pipelining; plain: one rank at a time
SYNTHETIC = ("--rule.name", "synthetic", "--predictor.rows", "0.25")
RULES = {
    "local": ("--rule.name", "local"),
    "synthetic": SYNTHETIC,
    "synthetic-whole": ("--rule.name", "synthetic"),  # its predictor learns from all rows of each gradient
    "synthetic-lazily": ("--rule.name", "synthetic", "--predictor.lazily", "8"),
    "synthetic-int8": (*SYNTHETIC, "--wire.activations", "int8", "--wire.gradients", "int8"),
    "blend": ("--rule.name", "blend"),
    "blend-every-4": ("--rule.name", "blend", "--wire.gradient_every", "4"),
    "delayed-4": ("--rule.name", "delayed", "--rule.accumulate", "4"),
}
SYSTEMS = (*SCHEDULES, *RULES)
MAIN = (*SCHEDULES, "local", "synthetic", "blend", "delayed-4")  # where nothing else is asked for
PLAIN = Link()  # no delay, no limit
SIZE = 8  # samples of a micro-batch (lm.toml)


@dataclass(frozen=True)
class Condition:
    """Under which a system is measured. Seconds, and bits a second."""

    stages: int
    link: Link = PLAIN
    sleep: float = 0.0  # 0: real computation
    slow: tuple[tuple[int, float], ...] = ()
    features: int = FEATURES  # of what passes between stages that sleep

    def __str__(self) -> str:
        words = [f"K = {self.stages}", f"{1000 * self.link.delay:g} ms"]
        words += [f"± {1000 * self.link.jitter:g} ms"] * (self.link.jitter > 0)
        words += [f"{self.link.rate / 1e6:g} Mbit/s"] * (self.link.rate > 0)
        words += [f"compute sleep={1000 * self.sleep:g}ms"] * (self.sleep > 0)
        words += [f"stage {stage} {factor:g} x slower" for stage, factor in self.slow]
        words += [f"{self.features} features"] * (self.features != FEATURES)
        return ", ".join(words)


@dataclass(frozen=True)
class Record:
    """What one run came to. A search for the number of micro-batches has repeat -1."""

    system: str
    condition: Condition
    microbatches: int
    repeat: int
    ranks: list[Measured]
    links: str
    session: str  # when the command that made it was started
    torch: str = field(default_factory=lambda: version("torch"))
    processor: str = field(default_factory=processor)

    @property
    def rate(self) -> float:
        """Samples a second: of the slowest rank, or for stages alone of all of them in a pipeline (`Study.limit`)."""
        return min(rank.samples / rank.seconds for rank in self.ranks)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Record:
        values: dict[str, Any] = json.loads(text)
        condition = values.pop("condition")
        slow = tuple((int(stage), float(factor)) for stage, factor in condition["slow"])
        known = {name: condition[name] for name in ("stages", "sleep", "features") if name in condition}
        made = Condition(link=Link(**condition["link"]), slow=slow, **known)
        return cls(condition=made, ranks=[Measured(**rank) for rank in values.pop("ranks")], **values)


@dataclass(frozen=True)
class Study:
    """Args:
    conditions: alike in their number of stages stand together.
    microbatches: numbers that are tried for each schedule; a single one is used without a search.
    repeats, seconds: of each measurement.
    """

    conditions: tuple[Condition, ...]
    systems: tuple[str, ...] = MAIN
    microbatches: tuple[int, ...] = (4, 8, 16, 32)
    repeats: int = 3
    seconds: float = 6.0
    links: str = "none"

    def carry_out(self, place: Place, found: list[Record], keep: Callable[[Record], None]) -> None:
        """Every run that `found` lacks, in order; each goes to `keep` as soon as it is there. Raises RunFailed."""
        session = time.strftime("%Y-%m-%d %H:%M")
        known = {(r.system, r.condition, r.microbatches, r.repeat) for r in found}

        def measure(system: str, condition: Condition, microbatches: int, repeat: int) -> None:
            if (system, condition, microbatches, repeat) not in known:
                ranks = self._measure(place, found, system, condition, microbatches)
                record = Record(system, condition, microbatches, repeat, ranks, self.links, session)
                found.append(record)
                known.add((system, condition, microbatches, repeat))
                keep(record)

        for condition in self.conditions:
            schedules = [system for system in self.systems if system in SCHEDULES and system != "plain"]
            for number in self.microbatches if len(self.microbatches) > 1 else ():
                for system in schedules:
                    measure(system, condition, number, -1)
            systems = (ALONE, *self.systems)
            for repeat in range(self.repeats):
                turn = repeat % len(systems)
                for system in (*systems[turn:], *systems[:turn]):
                    measure(system, condition, self.best(found, system, condition), repeat)

    def best(self, found: list[Record], system: str, condition: Condition) -> int:
        """The number of micro-batches a step with the highest throughput in the search."""
        if system not in SCHEDULES or system == "plain":
            return 1
        tried = {r.microbatches: r.rate for r in found if (r.system, r.condition, r.repeat) == (system, condition, -1)}
        return max(tried, key=tried.__getitem__) if tried else self.microbatches[0]

    def _measure(
        self, place: Place, found: list[Record], system: str, condition: Condition, microbatches: int
    ) -> list[Measured]:
        what = {name: getattr(condition, name) for name in ("stages", "sleep", "slow", "features")}
        order = Order(system, **what, microbatches=microbatches, seconds=self.seconds)
        if system == ALONE:
            return [each for group in _groups(order) for each in place.run(group, PLAIN)]
        if system in SCHEDULES:
            return place.run([order] * condition.stages, condition.link)
        expected = limit(found, condition) or SIZE
        batches = max(30, round(self.seconds * expected / SIZE))
        with tempfile.TemporaryDirectory() as folder:
            order = replace(order, system="dnipipe", words=RULES[system], batches=batches, folder=f"{folder}/run")
            return place.run([order] * condition.stages, condition.link)


def _groups(order: Order) -> Iterator[list[Order]]:
    """Stages that run alone at the same time: as many as there are cores, for each is bound to one."""
    each = len(cores()) if order.sleep == 0 else order.stages
    for first in range(0, order.stages, each):
        yield [replace(order, stage=stage) for stage in range(first, min(first + each, order.stages))]


def limit(found: Sequence[Record], condition: Condition) -> float | None:
    """Samples a second that no pipeline of these stages exceeds: the slowest stage's alone, or, with more stages than
    cores, all cores busy with all stages' work, if that is less. The median of the repeats: of those in turn with the
    condition's systems, or, in records of before 2026-11-27, of those before the first link.
    """
    alone = [r for r in found if r.system == ALONE]
    beside = [r for r in alone if r.condition == condition]
    rates = [_limit(r) for r in beside or alone if r.condition in (condition, replace(condition, link=PLAIN))]
    return sorted(rates)[len(rates) // 2] if rates else None


def _limit(record: Record) -> float:
    times = [rank.seconds / rank.samples for rank in record.ranks]  # of a sample, each stage
    here = len(cores()) if record.condition.sleep == 0 and record.links != "hosts" else len(times)
    return min(1 / max(times), here / sum(times))


def load(path: Path) -> list[Record]:
    return [Record.from_json(line) for line in path.read_text().splitlines()] if path.exists() else []
