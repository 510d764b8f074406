"""Tables and plots of the study, from its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.cells import Record, Records
from benchmarks.learning.study import RULES, STAGES, TASKS, Learning
from benchmarks.plots import Line, Plot
from benchmarks.tables import MISSING, average, entry, markdown

FIGURES: dict[str, tuple[Callable[[Record], float | None], int, str]] = {
    "loss": (lambda record: record.loss, 3, "held-out loss, nats per byte"),
    "error": (lambda record: record.error, 2, "test error, %"),
}


@dataclass(frozen=True)
class LearningStudy(Learning):
    """The study with what is made of it."""

    @property
    def title(self) -> str:
        return "Learning" + ", quick: far too short a training to compare anything" * self.quick

    @property
    def shown(self) -> tuple[str, ...]:
        return self.wanted.tasks

    def tables(self, records: Records) -> dict[str, str]:
        return {task: f"## {task}: {_figure(task)[2]}\n\n{self._table(task, records)}" for task in self.axes.tasks}

    def plots(self, records: Records) -> list[Plot]:
        return [plot for task in self.axes.tasks for plot in self._plots(task, records)]

    def _table(self, task: str, records: Records) -> str:
        value, digits, _ = _figure(task)
        rows, missing = [], []
        for rule in self.axes.rules:
            for delay in self.delays(rule, self.axes.delays):
                entries = []
                for stages in self.axes.stages:
                    mine = self._seeds(task, rule, stages, delay, records)
                    baseline = zip(self._seeds(task, "sync", stages, 0, records), mine, strict=True)
                    sync = average([one for one, run in baseline if run is not None], value)  # of the same seeds
                    own = average(mine, value)
                    beside = "" if None in (own, sync) or rule == "sync" else _above(task, own or 0.0, sync or 1.0)
                    entries.append(entry(mine, value, digits, beside))
                if set(entries) == {MISSING}:
                    missing.append(f"{rule} at {delay}" if RULES[rule].late else rule)
                    continue
                shown = str(delay) if RULES[rule].late else "any"
                rows.append([rule, shown, self.rate(task, rule, delay, records) or MISSING, *entries])
        head = ["rule", "delay", "rate", *(f"K = {stages}" for stages in self.axes.stages)]
        return (markdown(head, rows) if rows else "") + (f"\nNot run: {', '.join(missing)}.\n" if missing else "")

    def _seeds(self, task: str, rule: str, stages: int, delay: int, records: Records) -> list[Record | None]:
        delay = delay if RULES[rule].late else 0
        return [records.of(self.cell(task, rule, stages, delay, seed, records)) for seed in self.axes.seeds]

    def _plots(self, task: str, records: Records) -> list[Plot]:
        """Loss over training, cosine over training, the end against K, the end against the delay."""
        value, _, label = _figure(task)
        axes, stages = self.axes, STAGES if STAGES in self.axes.stages else self.axes.stages[0]

        def over_training(delay: int) -> dict[str, Line]:
            runs = {rule: self._seeds(task, rule, stages, delay, records) for rule in axes.rules}
            return {rule: line for rule, found in runs.items() if (line := _mean_curve(found))}

        def ends(places: Iterable[tuple[int, int, int]], rule: str) -> Line | None:
            """(x, stages, delay) of each point."""
            found = [(x, average(self._seeds(task, rule, k, delay, records), value)) for x, k, delay in places]
            known = [(x, y) for x, y in found if y is not None]
            return ([x for x, _ in known], [y for _, y in known]) if known else None

        def lines(places: Sequence[tuple[int, int, int]]) -> dict[str, Line]:
            return {rule: line for rule in axes.rules if (line := ends(places, rule))}

        def cosines(rule: str) -> dict[str, Line]:
            one = records.of(self.cell(task, rule, stages, axes.delays[0], axes.seeds[0], records))
            curves = enumerate(one.cosine) if one else ()
            return {f"stage {k}": ([x for x, _ in curve], [y for _, y in curve]) for k, curve in curves if curve}

        by_stages = {f"delay {d}": lines([(k, k, d) for k in axes.stages]) for d in axes.delays}
        by_delay = {f"K = {k}": lines([(d, k, d) for d in axes.delays]) for k in axes.stages}
        training = {f"delay {d}": over_training(d) for d in axes.delays}
        seen = {rule: cosines(rule) for rule in axes.rules}
        x, at = "samples", f"{task}, K = {stages}"
        return [
            Plot(f"{task}-training", x, f"{at}: {_evaluated(task)}", training, marks=True),
            Plot(f"{task}-cosine", "batches", f"{at}, delay {axes.delays[0]}: cosine of ĝ with g", seen),
            Plot(f"{task}-stages", "K", f"{task}: {label}", by_stages, marks=True),
            Plot(f"{task}-delay", "batches a hop", f"{task}: {label}", by_delay, marks=True),
        ]


def _figure(task: str) -> tuple[Callable[[Record], float | None], int, str]:
    return FIGURES[TASKS[task].figure]


def _evaluated(task: str) -> str:
    return "held-out loss, nats per byte" if TASKS[task].figure == "loss" else "loss on the test set"


def _above(task: str, own: float, sync: float) -> str:
    """How far above plain autograd: in percent of a loss, in points of an error."""
    return f" {100 * (own / sync - 1):+.1f} %" if TASKS[task].figure == "loss" else f" {own - sync:+.2f}"


def _mean_curve(records: Sequence[Record | None]) -> Line | None:
    """(samples, mean loss over the seeds) of the evaluations that all of them have."""
    found = [record for record in records if record is not None and record.evaluations]
    if not found:
        return None
    curves = [{batch: loss for batch, loss, _ in record.evaluations} for record in found]
    shared = [batch for batch in curves[0] if all(batch in curve for curve in curves)]
    samples = [batch * found[0].settings["data.batch"] for batch in shared]
    return samples, [mean(curve[batch] for curve in curves) for batch in shared]
