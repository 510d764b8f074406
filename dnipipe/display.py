"""What stage 0 shows while it trains: a live table on a terminal, plain lines elsewhere, nothing if quiet.

    batch 320/600 ━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━  53 %   0:31 left   loss 2.214   1530 samples/s
    stage   batches   samples/s   cosine   |ĝ|/|g|   staleness   in flight   idle %
        0       320        1530     0.71      0.84         2.1      2 of 4        3
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dnipipe.messages import Report

REDRAW = 0.25  # seconds between two drawings on a terminal
LINE = 5.0  # seconds between two plain lines
COLUMNS = ("stage", "batches", "samples/s", "cosine", "|ĝ|/|g|", "staleness", "in flight", "idle %")


class Display:
    """The run as a person follows it.

    Args:
        stages: K. total: the last batch id. start: the batch id that the run continues from.
        console: where to; a terminal gets the live table.
    """

    def __init__(
        self,
        stages: int,
        total: int,
        start: int = 0,
        *,
        quiet: bool = False,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stages, self.total, self.start, self.quiet, self.now = stages, total, start, quiet, now
        self.console = console or Console()
        self.reports: dict[int, Report] = {}
        self.loss: float | None = None
        self.evaluated = ""
        self._began = self._drawn = now()
        self._live = None
        if self.console.is_terminal and not quiet:
            self._live = Live(console=self.console, auto_refresh=False, transient=False)

    def note(self, text: str) -> None:
        """A line of its own, above the table."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, report: Report) -> None:
        """A stage has reported; drawn when it is time to."""
        first = not self.reports
        self.reports[report.stage] = report
        self.loss = report.numbers.get("loss", self.loss)
        if first:
            self._began = self._drawn = self.now()
            if self._live:
                self._live.start()
        if not self.quiet and self.now() - self._drawn >= (REDRAW if self._live else LINE):
            self._draw()

    def evaluation(self, batch: int, loss: float, accuracy: float | None) -> None:
        shown = f"evaluation at batch {batch}: loss {loss:.4f}"
        self.evaluated = shown + (f", accuracy {accuracy:.2%}" if accuracy is not None else "")
        if not self.quiet and not self._live:
            self.note(self.evaluated)

    def close(self) -> None:
        if self._live and self.reports:
            self._draw()
            self._live.stop()
            self._live = None

    # -- drawing -----------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        self._drawn = self.now()
        if self._live:
            self._live.update(Group(self._progress(), self._table(), Text(self.evaluated)), refresh=True)
        else:
            self.note(self._line())

    @property
    def batch(self) -> int:
        """The last batch that every stage has trained."""
        return min((report.batch for report in self.reports.values()), default=self.start)

    def left(self) -> str:
        """Time left at the pace so far, as minutes:seconds."""
        done = self.batch - self.start
        if done <= 0:
            return "?:??"
        seconds = (self.now() - self._began) / done * (self.total - self.batch)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def _speed(self) -> float:
        last = self.reports.get(self.stages - 1)
        return last.numbers["samples_per_second"] if last else 0.0

    def _headline(self) -> str:
        loss = f"   loss {self.loss:.4f}" if self.loss is not None else ""
        return f"{self.left()} left{loss}   {self._speed():.0f} samples/s"

    def _progress(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.total, completed=self.batch, width=24)
        grid.add_row(f"batch {self.batch}/{self.total}", bar, f"{self.batch / self.total:.0%}", self._headline())
        return grid

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1))
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for stage in range(self.stages):
            report = self.reports.get(stage)
            table.add_row(str(stage), *(_cells(report) if report else []))
        return table

    def _line(self) -> str:
        """One plain line: the whole, and then the stages side by side."""
        numbers = [self.reports[k].numbers if k in self.reports else {} for k in range(self.stages)]
        cosines = " ".join(_number(each.get("cosine"), ".2f") for each in numbers)
        idle = " ".join(_number(each.get("idle"), ".0%") for each in numbers)
        return f"batch {self.batch}/{self.total}   {self._headline()}   cosine {cosines}   idle {idle}"


def _cells(report: Report) -> list[str]:
    numbers = report.numbers
    return [
        str(report.batch),
        _number(numbers.get("samples_per_second"), ".0f"),
        _number(numbers.get("cosine"), ".2f"),
        _number(numbers.get("norm_ratio"), ".2f"),
        _number(numbers.get("staleness"), ".1f"),
        f"{numbers.get('in_flight', 0):.0f} of {numbers.get('window', 0):.0f}",
        _number(numbers.get("idle", 0) * 100, ".0f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


__all__ = ["Display"]
