"""A task's probes, searches and races, in that order; whatever has a record is not made again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cells import Cell, Records
from benchmarks.grid import Grid
from benchmarks.time_to_loss.race import PROBE, RACE, Course, Run, Runs
from benchmarks.time_to_loss.study import (
    NO_SPLIT,
    SYNC,
    Setting,
    Split,
    Task,
    best,
    curve,
    lateness,
    needed,
    search,
    splits,
    target,
)

PROBED, STEPS = 4096, 12  # of a probe: samples of a decoupled system, steps of a synchronous one
MARGIN = 1.25  # a race is so many times as long as the search run took to the target


@dataclass(frozen=True)
class Contest:
    """Args:
    name, task: what is trained. delays: of the links, one way, seconds. seeds: of the races; a search has seed 0.
    """

    name: str
    task: Task
    systems: tuple[str, ...]
    delays: tuple[float, ...]
    seeds: tuple[int, ...]

    def carry_out(self, course: Course, runs: Runs, records: Records, jobs: int) -> bool:
        """Whether all of it is there now. Raises RunFailed, KeyboardInterrupt."""
        for system, setting, delay in self.probes():
            samples = STEPS * setting.batch if system == SYNC else PROBED
            self._run(course, runs, PROBE, system, setting, delay, samples, 0)
        cells = list(self.searches(runs))
        if not Grid(lambda _: cells, records, {self.task.data: course.root}, jobs).run():
            return False
        for seed in self.seeds:
            for turn, delay in enumerate(self.delays):
                first = (seed + turn) % len(self.systems)
                for system in (*self.systems[first:], *self.systems[:first]):
                    setting, samples = self.choice(system, delay, runs, records)
                    self._run(course, runs, RACE, system, setting, delay, samples, seed)
        return True

    def probes(self) -> Iterator[tuple[str, Setting, float]]:
        """(system, setting, delay): a decoupled system's pace does not hang on the link, so one delay tells it.

        Nor does any hang on the rate, which is the same for all.
        """
        rate = self.task.rates[min(self.task.rates)][0]
        for system in self.systems:
            for batch in self.task.batches:
                for split in splits(batch) if system == SYNC else (NO_SPLIT,):
                    for delay in self.delays if system == SYNC else self.delays[:1]:
                        yield system, Setting(batch, rate, split), delay

    def searches(self, runs: Runs) -> Iterator[Cell]:
        """As late as the links make a gradient, by the probes; backprop's runs too, which set the target."""
        for system in dict.fromkeys((SYNC, *self.systems)):
            for batch in self.task.batches:
                for late in sorted({self.late(system, batch, delay, runs) for delay in self.delays}):
                    yield from (c for c in search(self.name, self.task, system, late) if c.labels["batch"] == batch)

    def late(self, system: str, batch: int, delay: float, runs: Runs) -> int:
        if system == SYNC:
            return 0
        (run,) = self._probed(system, batch, delay, runs)
        return lateness(system, delay, batch * run.pace, run.staleness or 0.0)

    def pace(self, system: str, batch: int, delay: float, runs: Runs) -> tuple[float, Split]:
        """Seconds a sample, of the split that is the fastest over this link."""
        return min((run.pace, run.setting.split) for run in self._probed(system, batch, delay, runs))

    def _probed(self, system: str, batch: int, delay: float, runs: Runs) -> list[Run]:
        """One; of `sync` one a split."""
        at = delay if system == SYNC else self.delays[0]
        newest = {run.setting: run for run in runs.of(PROBE, self.name, system, at) if run.setting.batch == batch}
        return list(newest.values())

    def choice(self, system: str, delay: float, runs: Runs, records: Records) -> tuple[Setting, int]:
        """The setting that is expected to be at the target first, and samples that are enough.

        If none came to the target in the search: the one with the lowest loss at its end, for as long.
        """
        task, cells = self.task, []
        for batch in task.batches:
            pace, _ = self.pace(system, batch, delay, runs)
            for cell in search(self.name, task, system, self.late(system, batch, delay, runs)):
                if cell.labels["batch"] == batch:
                    cells.append((cell, pace))
        loss = target(self.name, task, records)
        assert loss is not None  # the search is complete
        found = best(cells, records, loss)
        cell = found[0] if found else min((c for c, _ in cells), key=lambda c: _end(c, records))
        setting = Setting(int(str(cell.labels["batch"])), str(cell.labels["rate"]))
        split = self.pace(system, setting.batch, delay, runs)[1]
        samples = needed(records.of(cell), loss) or task.samples
        whole = -(-min(MARGIN * samples, task.samples) // task.every) * task.every
        return Setting(setting.batch, setting.rate, split), int(whole)

    def _run(
        self,
        course: Course,
        runs: Runs,
        kind: str,
        system: str,
        setting: Setting,
        delay: float,
        samples: int,
        seed: int,
    ) -> None:
        if any(run.is_of(setting, samples, seed, course.links) for run in runs.of(kind, self.name, system, delay)):
            return
        run = course.run(kind, self.name, self.task, system, setting, delay, samples, seed)
        runs.add(run)
        last = f", loss {run.points[-1][2]:.4f} after {run.points[-1][1]:.1f} s" if run.points else ""
        print(
            f"{kind} {self.name}, {1000 * delay:g} ms: {system}, {setting}: {1 / run.pace:.0f} samples/s{last}",
            flush=True,
        )


def _end(cell: Cell, records: Records) -> float:
    record = records.of(cell)
    return min((loss for _, loss in curve(record)), default=float("inf")) if record else float("inf")
