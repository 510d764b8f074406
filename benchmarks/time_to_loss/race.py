"""One run over the link, in real processes: how its loss fell, by samples and by seconds; and the records of all.

stage 0's metrics     [batch, loss] of each evaluation ─┐
last stage's metrics  when it was through with a batch ─┴─► [samples, seconds, loss]
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.cells import DATA
from benchmarks.emulator import Link
from benchmarks.figures import processor
from benchmarks.throughput.places import Here
from benchmarks.time_to_loss.study import STAGES, SYSTEMS, Curve, Setting, Task, words

EVERY = 0.05  # seconds between two lines of metrics; a line has one evaluation, the last of those that came meanwhile
PROBE = "probe"
RACE = "race"
SKIPPED = 0.25  # part of a run before its pace and staleness count: connecting, and a window that grows


@dataclass(frozen=True)
class Run:
    """What came of a run over a link. The delay is one way, seconds."""

    kind: str  # PROBE or RACE
    task: str
    system: str
    setting: Setting
    delay: float
    seed: int
    samples: int  # trained
    pace: float  # seconds a sample
    staleness: float | None  # of stage 0, updates, mean
    points: list[list[float]]  # [samples, seconds, validation loss]; seconds without those of evaluations
    links: str
    command: str
    session: str  # when it was made
    torch: str = field(default_factory=lambda: version("torch"))
    processor: str = field(default_factory=processor)

    @property
    def by_seconds(self) -> Curve:
        return [(seconds, loss) for _, seconds, loss in self.points]

    def is_of(self, setting: Setting, samples: int, seed: int, links: str) -> bool:
        return (self.setting, self.samples, self.seed, self.links) == (setting, samples, seed, links)


class Runs:
    """All runs of a file of JSON lines; a new one is on disk as soon as it is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.all = [_run(json.loads(line)) for line in lines]

    def of(self, kind: str, task: str, system: str, delay: float) -> list[Run]:
        wanted = (kind, task, system, delay)
        return [run for run in self.all if (run.kind, run.task, run.system, run.delay) == wanted]

    def raced(self, task: str) -> list[Run]:
        """By delay and system. Of a system that was raced again, because another setting was chosen, the newest."""
        newest = {
            (run.delay, SYSTEMS.index(run.system), run.seed): run
            for run in self.all
            if (run.kind, run.task) == (RACE, task)
        }
        return [newest[place] for place in sorted(newest)]

    def add(self, run: Run) -> None:
        self.all.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(run), allow_nan=False) + "\n")


def _run(values: dict[str, Any]) -> Run:
    setting = values.pop("setting")
    schedule, number = setting["split"]
    return Run(setting=Setting(setting["batch"], setting["rate"], (schedule, number)), **values)


@dataclass(frozen=True)
class Course:
    """Where runs are made. Args: root: data.root. links: what the place is called."""

    where: Here
    links: str
    root: str

    def run(
        self, kind: str, name: str, task: Task, system: str, setting: Setting, delay: float, samples: int, seed: int
    ) -> Run:
        """Train so many samples over a link with this delay, one way. Raises RunFailed."""
        given = (task.config, *words(task, system, setting, samples, seed))
        given += ("--eval.every", "0") if kind == PROBE else ()
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            output = (f"--output.run={run}", f"--output.every={EVERY}", "--output.quiet=true")
            self.where.train([*given, "--data.root", os.path.abspath(self.root), *output], STAGES, Link(delay=delay))
            lines = [_lines(run / "metrics" / f"stage-{k}.jsonl") for k in range(STAGES)]
        return Run(
            kind,
            name,
            system,
            setting,
            delay,
            seed,
            samples,
            pace(lines[-1], setting.batch),
            staleness(lines[0]),
            points(lines[0], lines[-1], setting.batch),
            self.links,
            " ".join(["dnipipe train", *given, "--data.root", DATA[task.data]]),
            time.strftime("%Y-%m-%d %H:%M"),
        )


def pace(lines: Sequence[dict[str, float]], batch: int) -> float:
    """Seconds a sample in a stage, evaluations left out, from its lines of metrics behind the first part of the run."""
    times = through(lines)
    (first, began), (last, ended) = next((t for t in times if t[0] >= SKIPPED * times[-1][0]), times[0]), times[-1]
    if last == first:
        return ended / (last * batch)  # too short to leave a part out
    return (ended - began) / ((last - first) * batch)


def staleness(lines: Sequence[dict[str, float]]) -> float | None:
    """Mean of a stage, updates, behind the first part of the run. None: no gradient came."""
    late = [line for line in lines if "staleness" in line and line["batch"] >= SKIPPED * lines[-1]["batch"]]
    batches = sum(line["batches"] for line in late)
    return sum(line["staleness"] * line["batches"] for line in late) / batches if batches else None


def points(first: Sequence[dict[str, float]], last: Sequence[dict[str, float]], batch: int) -> list[list[float]]:
    """[samples, seconds, loss] of each evaluation: the seconds when the last stage was through with its batch."""
    times = through(last)
    found = [(line["eval.batch"], line["eval.loss"]) for line in first if "eval.loss" in line]
    return [[at * batch, _when(times, at), loss] for at, loss in found]


def through(lines: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """(batch, seconds since the run began without those of evaluations and of the end), where it trained at all."""
    spent, found = 0.0, [(0.0, 0.0)]
    for line in lines:
        left_out = line["seconds.evaluation"] + line["seconds.checkpoint"] + line["seconds.wait_end"]
        spent += line["seconds"] - left_out
        if line["batches"]:
            found.append((line["batch"], spent))
    return found


def _when(times: Sequence[tuple[float, float]], batch: float) -> float:
    """Seconds at a batch, by a straight line between the two nearest that are known."""
    for (before, began), (after, ended) in pairwise(times):
        if batch <= after:
            return began + (ended - began) * (batch - before) / (after - before)
    return times[-1][1]


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


__all__ = ["PROBE", "RACE", "Course", "Run", "Runs", "pace", "points", "staleness", "through"]
