"""What stage 0 shows while it trains: a live table on a terminal, plain lines elsewhere, nothing if quiet.

batch 320/600 ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━ 53%  0:31 left
loss 2.2140   1530 samples/s
stage   batches  samples/s  cosine  norm ratio  staleness  in flight  idle %
    0       322       1530    0.71        0.84        2.1     2 of 4       3
evaluation at batch 300: loss 2.2514

It draws only inside a call of the worker's, a few times a second: no thread of its own, nothing to wait for. What it
writes itself is ASCII (the bar falls back to it), for a terminal may know nothing else and must not end the run.
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
LINE = 5.0  # seconds between two plain lines; sooner if a twentieth of the run is done
WIDTH = 78  # columns, of a terminal that has them
COLUMNS = ("stage", "batches", "samples/s", "cosine", "norm ratio", "staleness", "in flight", "idle %")


class Display:
    """The run as a person follows it.

    Args:
        stages: K. total: the last batch id. start: the batch id that the run continues from.
        console: where to; a terminal gets the live table.
        now: the time in seconds.
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
        self._trained: dict[int, Report] = {}  # of each stage, the last report of an interval in which it trained
        self._began = self._drawn = now()
        self._shown = start  # batch of the last plain line
        self._live: Live | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal and not quiet:
            self._live = Live(console=self.console, auto_refresh=False)

    def note(self, text: str) -> None:
        """A line of its own, above the table."""
        if not self.quiet:
            known = text.encode(self.console.encoding, "replace").decode(self.console.encoding)
            self.console.print(known, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def update(self, report: Report) -> None:
        """A stage has reported; drawn when it is time to."""
        first = not self.reports
        self.reports[report.stage] = report
        if report.numbers.get("batches"):
            self._trained[report.stage] = report
        self.loss = report.numbers.get("loss", self.loss)
        if first:
            self._began = self.now() - report.numbers.get("seconds", 0.0)  # the first report says since when
            self._drawn = self._began
            if self._live:
                self._live.start()
        if not self.quiet and self._is_due():
            self._draw()

    def evaluation(self, batch: int, loss: float, accuracy: float | None) -> None:
        shown = f"evaluation at batch {batch}: loss {loss:.4f}"
        self.evaluated = shown + (f", accuracy {accuracy:.2%}" if accuracy is not None else "")
        if not self._live:
            self.note(self.evaluated)

    def close(self) -> None:
        """The last picture stays: the stages as they trained, not as they stood at the end. May be called twice."""
        self.reports |= self._trained
        if self._live and self._live.is_started:
            self._draw()
            self._live.stop()
        elif self._live is None and self.batch > self._shown and not self.evaluated:
            self._draw()  # not behind an evaluation, which would count as time spent on the last few batches
        self._live, self.quiet = None, True

    # -- drawing -----------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        passed = self.now() - self._drawn
        if self._live:
            return passed >= REDRAW
        if len(self.reports) < self.stages:
            return False
        return passed >= LINE or self.batch - self._shown >= max(1, (self.total - self.start) / 20)

    def _draw(self) -> None:
        self._drawn, self._shown = self.now(), self.batch
        if self._live:
            picture = Group(self._progress(), Text(self._pace()), self._table(), Text(self.evaluated))
            self._live.update(picture, refresh=True)
        else:
            self.note(self._line())

    @property
    def batch(self) -> int:
        """The last batch that every stage has trained."""
        return min(self.reports[k].batch if k in self.reports else self.start for k in range(self.stages))

    def left(self) -> str:
        """Time left at the pace so far, [hours:]minutes:seconds."""
        done = self.batch - self.start
        if done <= 0:
            return "?:??"
        seconds = int((self.now() - self._began) / done * (self.total - self.batch))
        minutes, hours = seconds // 60 % 60, seconds // 3600
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"

    def _pace(self) -> str:
        last = self.reports.get(self.stages - 1)
        speed = _number(last.numbers.get("samples_per_second") if last else None, ".0f")
        return f"loss {_number(self.loss, '.4f')}   {speed} samples/s"

    def _progress(self) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.width = min(WIDTH, self.console.width)
        for ratio in (None, 1, None, None):
            grid.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=self.total, completed=self.batch, complete_style="cyan", finished_style="green")
        share = f"{self.batch / max(1, self.total):.0%}"
        grid.add_row(f"batch {self.batch}/{self.total}", bar, share, f" {self.left()} left")
        return grid

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 1), pad_edge=False, header_style="dim")
        table.width = min(WIDTH, self.console.width)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for stage in range(self.stages):
            report = self.reports.get(stage)
            table.add_row(str(stage), *(_cells(report) if report else []))
        return table

    def _line(self) -> str:
        """One plain line: the whole, and then the stages side by side."""
        numbers = [self.reports[k].numbers if k in self.reports else {} for k in range(self.stages)]
        cosines = " ".join(map(_cosine, numbers))
        idle = " ".join(_percent(each.get("idle")) for each in numbers)
        pace = f"batch {self.batch}/{self.total}   {self._pace()}   {self.left()} left"
        return f"{pace} | cosine {cosines}   idle % {idle}"


def _cells(report: Report) -> list[str]:
    numbers = report.numbers
    return [
        str(report.batch),
        _number(numbers.get("samples_per_second"), ".0f"),
        _cosine(numbers),
        _number(numbers.get("norm_ratio"), ".2f"),
        _number(numbers.get("staleness"), ".1f"),
        f"{numbers.get('in_flight', 0):.0f} of {numbers.get('window', 0):.0f}",
        _percent(numbers.get("idle")),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _cosine(numbers: dict[str, float]) -> str:
    """In brackets while the stage does not update at once on most batches: a warm-up, no trust, rule.p_update."""
    shown = _number(numbers.get("cosine"), ".2f")
    return f"({shown})" if shown != "-" and numbers.get("at_once", 1.0) < 0.5 else shown


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f}"


__all__ = ["Display"]
