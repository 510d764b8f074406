"""What the runs of an outage say: the loss by the clock, and what each stage has trained, as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.plots import Line, Plot
from benchmarks.tables import MISSING, markdown

WAYS = ("go on", "wait")  # what the stages before the one that is away do
NEVER = "never away"
LAST = 5.0  # seconds whose evaluations count as one moment's


@dataclass(frozen=True)
class Settings:
    """Of all runs. Seconds; batches a second."""

    before: float
    away: float
    after: float
    stages: int
    rate: float

    def __str__(self) -> str:
        return (
            f"Of {self.stages} stages one is away from {self.before:g} to {self.back:g} s, in runs of {self.end:g} s; "
            f"at most {self.rate:g} batches a second."
        )

    @property
    def back(self) -> float:
        """When the stage is started again."""
        return self.before + self.away

    @property
    def end(self) -> float:
        return self.back + self.after

    def moments(self) -> dict[str, float]:
        """What the table shows the loss at: title -> seconds since the run began."""
        later = self.back + self.after / 3
        return {"before": self.before, f"{later - self.back:g} s after": later, f"{self.after:g} s after": self.end}


@dataclass(frozen=True)
class Outage:
    """One run. `losses`: (second, nats a byte of held-out text); `trained`, `alone`: batches by stage, in its time."""

    stage: int | None
    way: str
    seed: int
    trained: list[int]
    alone: list[int]  # of these, those without the next stage
    losses: list[tuple[float, float]]

    @property
    def label(self) -> str:
        return self.way if self.stage is None else f"stage {self.stage} away, the others {self.way}"

    def at(self, second: float) -> float | None:
        """The mean of the evaluations of the LAST seconds before it; None if there was none."""
        values = [loss for time, loss in self.losses if second - LAST < time <= second]
        return mean(values) if values else None

    def line(self) -> str:
        end = self.losses[-1] if self.losses else (0.0, float("nan"))
        trained = ", ".join(map(str, self.trained))
        return f"{self.label}, seed {self.seed}: loss {end[1]:.3f} after {end[0]:.0f} s; batches {trained}"


def table(settings: Settings, runs: Sequence[Outage]) -> str:
    moments = settings.moments()
    rows = []
    for label, own in _by_label(runs):
        losses = [_spread([run.at(second) for run in own]) for second in moments.values()]
        counts = [_each(run.trained for run in own), _each(run.alone for run in own)]
        rows.append([label, *losses, *counts])
    head = ["", *(f"loss, {title}" for title in moments), "batches by stage", "of these alone"]
    return markdown(head, rows)


def plots(settings: Settings, runs: Sequence[Outage]) -> list[Plot]:
    """The loss of seed 0 by the clock, a panel for each stage that is away."""
    first = [run for run in runs if run.seed == 0]
    never: dict[str, Line] = {run.way: _line(run) for run in first if run.stage is None}
    panels: dict[str, dict[str, Line]] = {}
    for run in first:
        if run.stage is not None:
            title = f"stage {run.stage} of {settings.stages} away, {settings.before:g} to {settings.back:g} s"
            panels.setdefault(title, dict(never))[f"the others {run.way}"] = _line(run)
    return [Plot("outage", "seconds", "held-out loss, nats a byte", panels, marks=True)]


def _by_label(runs: Iterable[Outage]) -> Iterable[tuple[str, list[Outage]]]:
    groups: dict[str, list[Outage]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups.items()


def _line(run: Outage) -> Line:
    return [time for time, _ in run.losses], [loss for _, loss in run.losses]


def _spread(values: Sequence[float | None]) -> str:
    """Mean ± half the range (how many)."""
    found = [value for value in values if value is not None]
    if not found:
        return MISSING
    return f"{mean(found):.3f} ± {(max(found) - min(found)) / 2:.3f} ({len(found)})"


def _each(counts: Iterable[Sequence[int]]) -> str:
    """The mean by stage."""
    return ", ".join(f"{mean(stage):.0f}" for stage in zip(*counts, strict=True))


__all__ = ["LAST", "NEVER", "WAYS", "Outage", "Settings", "plots", "table"]
