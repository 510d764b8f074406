"""Tables and plots of the study, from its records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cells import Record, Records
from benchmarks.plots import Line, Plot
from benchmarks.tables import average, entry, markdown
from benchmarks.wire.study import NONE, TASKS, WAYS, WireCells, carried

FIGURES: dict[str, tuple[Callable[[Record], float | None], int, str]] = {
    "loss": (lambda record: record.loss, 3, "held-out loss, nats per byte"),
    "error": (lambda record: record.error, 2, "test error, %"),
}


@dataclass(frozen=True)
class WireStudy(WireCells):
    """The study with what is made of it."""

    @property
    def title(self) -> str:
        return "Accuracy against bytes on the wire"

    @property
    def shown(self) -> tuple[str, ...]:
        return self.wanted

    def tables(self, records: Records) -> dict[str, str]:
        return {task: f"## {task}: {FIGURES[TASKS[task].figure][2]}\n\n{self._table(task, records)}" for task in TASKS}

    def plots(self, records: Records) -> list[Plot]:
        """A picture a task: a line a way, from what it carries at its most to its least."""
        return [
            Plot(
                task,
                "KiB a batch across an edge, both ways",
                f"{task}: {FIGURES[TASKS[task].figure][2]}",
                {"": {way: line for way in TASKS[task].ways if (line := self._line(task, way, records))}},
                marks=True,
            )
            for task in TASKS
        ]

    def _table(self, task: str, records: Records) -> str:
        value, digits, _ = FIGURES[TASKS[task].figure]
        rows = []
        for way, setting in self.rows(task):
            down, up = self._bytes(task, way, setting)
            kib = [f"{size / 1024:.4g}" for size in (down, up, down + up)]
            rows.append([way, setting, *kib, entry(self.found(task, way, setting, records), value, digits)])
        return markdown(["", "", "KiB a batch down", "up", "both", FIGURES[TASKS[task].figure][2]], rows)

    def _line(self, task: str, way: str, records: Records) -> Line | None:
        value, _, _ = FIGURES[TASKS[task].figure]
        settings = [(way, setting) for setting in WAYS[way]]
        if way != "form":  # each begins with all of the bytes
            settings.insert(0, ("form", "as is"))
        found = [
            (sum(self._bytes(task, *one)) / 1024, average(self.found(task, *one, records), value)) for one in settings
        ]
        known = [(x, y) for x, y in found if y is not None]
        return ([x for x, _ in known], [y for _, y in known]) if known else None

    def _bytes(self, task: str, way: str, setting: str) -> tuple[float, float]:
        down, up = carried(self.seeds(task, way, setting)[0].loaded)
        return down, 0.0 if way == NONE else up
