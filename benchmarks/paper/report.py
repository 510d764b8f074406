"""The tables and plots of the paper's experiments, the paper's own figures beside ours."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cells import Records
from benchmarks.paper.published import CLAIMS, error
from benchmarks.paper.study import LONGER, METHODS, P_UPDATE, TABLES, TIMES, Paper, Row
from benchmarks.plots import Line, Plot
from benchmarks.tables import average, entry, markdown

TITLES = {
    "fcn": "Fully connected: test error, %",
    "cnn": "Convolutional: test error, %",
    "updates": "Each stage updates with probability p only, 4 layers, fully connected: test error, %",
    "unlocked": "Also unlocked forwards, with synthetic inputs, 4 layers, fully connected: test error, %",
    "deep": "21 layers, fully connected: test error, %",
    "length": "Longer, 3 layers, fully connected: test error, %",
    "length-6": "Longer, 6 layers, fully connected: test error, %",
    "length-21": "Longer, 21 layers, fully connected: test error, %",
}
ALL = (*TABLES, *LONGER)


@dataclass(frozen=True)
class PaperStudy(Paper):
    """The experiments with what is made of them."""

    @property
    def title(self) -> str:
        return f"The paper's experiments: {self.data}, protocol {self.protocol}"

    @property
    def shown(self) -> tuple[str, ...]:
        return self.names

    def tables(self, records: Records) -> dict[str, str]:
        return {table: f"## {TITLES[table]}\n\n{self._table(table, records)}" for table in ALL}

    def plots(self, records: Records) -> list[Plot]:
        return [self._training(table, records) if table == "deep" else self._ends(table, records) for table in ALL]

    def _table(self, table: str, records: Records) -> str:
        head, rows = [self._axis(table)], []
        for method in METHODS[table]:
            head += [method, "paper"] if self._published(table, 3, method) else [method]
        for row in self.rows(table):
            line = [self._at(table, row)]
            for method in METHODS[table]:
                line.append(entry(self.found(table, method, row, records), lambda record: record.error, 2))
                published = self._published(table, row.layers, method)
                line += [] if published is None else [str(published)]
            rows.append(line)
        claim = f"\n{CLAIMS[table]}\n" if table in CLAIMS and self.data == "mnist" else ""
        return markdown(head, rows) + claim

    def _axis(self, table: str) -> str:
        """What the lines of a table differ in."""
        return "p" if table in P_UPDATE else "iterations" if table in TIMES else "layers"

    def _at(self, table: str, row: Row) -> str:
        """And what that is in one of them."""
        return {"p": row.p, "iterations": str(self.iterations(row)), "layers": str(row.layers)}[self._axis(table)]

    def _published(self, table: str, layers: int, method: str) -> float | None:
        return error(self.data, table, layers, method) if table in ("fcn", "cnn") else None

    def _ends(self, table: str, records: Records) -> Plot:
        """The end of training, against what the lines differ in."""
        lines: dict[str, Line] = {}
        for method in METHODS[table]:
            points = []
            for row in self.rows(table):
                mean = average(self.found(table, method, row, records), lambda record: record.error)
                if mean is not None:
                    points.append((float(self._at(table, row)), mean))
            if points:
                lines[method] = [x for x, _ in points], [y for _, y in points]
        title = TITLES[table].partition(":")[0]
        return Plot(table, self._axis(table), f"{self.data}: test error, %", {title: lines}, marks=True)

    def _training(self, table: str, records: Records) -> Plot:
        """The loss of training, of the first seed's runs."""
        lines: dict[str, Line] = {}
        for row in self.rows(table):
            for method in METHODS[table]:
                first = self.found(table, method, row, records)[0]
                if first is not None and first.training:
                    lines[method] = [x for x, _ in first.training], [y for _, y in first.training]
        return Plot(table, "batches", f"{self.data}: training loss", {TITLES[table].partition(":")[0]: lines})
