"""The table on a terminal, the lines elsewhere, and the arithmetic of the time left: with a clock that stands still."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from dnipipe.display import LINE, REDRAW, Display
from dnipipe.messages import Report


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A display and what it wrote."""

    def __init__(self, stages: int = 2, total: int = 100, start: int = 0, **options: object) -> None:
        quiet, encoding = bool(options.pop("quiet", False)), str(options.pop("encoding", "utf-8"))
        self.bytes, self.time, self.stages = io.BytesIO(), Time(), stages
        self.file = io.TextIOWrapper(self.bytes, encoding=encoding, write_through=True)
        options = {"width": 80, "force_terminal": False, "color_system": None} | options
        console = Console(file=self.file, **options)  # type: ignore[arg-type]
        self.display = Display(stages, total, start, quiet=quiet, console=console, now=self.time)

    @property
    def text(self) -> str:
        return self.bytes.getvalue().decode(self.file.encoding)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def report(self, batch: int, after: float = 0.0, **numbers: float) -> None:
        """All stages report that they have trained up to `batch`, `after` seconds later."""
        self.time.now += after
        for stage in range(self.stages):
            found = {"batches": 1, "seconds": after, "samples_per_second": 1530.4, "idle": 0.03 + stage / 100}
            found |= {"staleness": 2.13, "in_flight": 2, "window": 4} | numbers
            found |= {"loss": 2.214} if stage == self.stages - 1 else {"cosine": 0.71 - stage / 100, "norm_ratio": 0.84}
            self.display.update(Report(stage, batch, found))


@pytest.fixture
def no_threads() -> Callable[[], bool]:
    before = set(threading.enumerate())
    return lambda: set(threading.enumerate()) <= before


# -- how long it takes -------------------------------------------------------------------------------------------


def test_the_first_report_already_tells_the_time_left() -> None:
    screen = Screen(total=100)
    assert screen.display.left() == "?:??"
    screen.report(10, after=10)  # ten batches in the ten seconds that the report is about
    assert screen.display.left() == "1:30"
    screen.report(20, after=5)  # faster: 20 batches in 15 s, 80 to go
    assert screen.display.left() == "1:00"
    screen.report(100, after=60)
    assert screen.display.left() == "0:00"


def test_a_wait_before_the_first_batch_does_not_count() -> None:
    """Minutes may pass until the neighbours are up."""
    screen = Screen(total=100)
    screen.time.now += 600
    screen.report(50, after=5)
    assert screen.display.left() == "0:05"


def test_a_resumed_run_counts_from_where_it_began() -> None:
    screen = Screen(total=100, start=80)
    screen.report(80, after=1)
    assert screen.display.left() == "?:??" and screen.display.batch == 80
    screen.report(90, after=4)
    assert screen.display.left() == "0:05"


def test_hours_are_told_as_hours() -> None:
    screen = Screen(total=7401)
    screen.report(1, after=1)
    assert screen.display.left() == "2:03:20"


def test_a_batch_is_done_when_every_stage_has_trained_it() -> None:
    screen = Screen(stages=2, total=100, start=3)
    screen.display.update(Report(0, 40, {"seconds": 1.0}))
    assert screen.display.batch == 3
    screen.display.update(Report(1, 37, {"seconds": 1.0}))
    assert screen.display.batch == 37


# -- plain lines -------------------------------------------------------------------------------------------------


def test_a_plain_line_says_it_all() -> None:
    screen = Screen(stages=3, total=600)
    screen.report(120, after=LINE)
    assert screen.lines == [
        "batch 120/600   loss 2.2140   1530 samples/s   0:20 left | cosine 0.71 0.70 -   idle % 3 4 5"
    ]


def test_plain_lines_come_every_few_seconds_or_a_twentieth_of_the_run() -> None:
    screen = Screen(total=1000)
    for _ in range(9):
        screen.report(49, after=LINE / 10)
    assert screen.lines == []
    screen.report(49, after=LINE / 10)  # now it is time
    assert len(screen.lines) == 1
    screen.report(98)  # 49 more
    assert len(screen.lines) == 1
    screen.report(99)  # a twentieth more
    assert [line.split()[1] for line in screen.lines][1:] == ["99/1000"]


def test_a_short_run_ends_with_a_line_and_a_second_close_adds_none() -> None:
    screen = Screen(total=1000)
    screen.report(30, after=0.5)
    screen.display.close()
    screen.display.close()
    assert len(screen.lines) == 1 and screen.lines[0].startswith("batch 30/1000")


def test_each_evaluation_is_a_line() -> None:
    screen = Screen()
    screen.display.evaluation(50, 2.31449, None)
    screen.display.evaluation(100, 2.0, 0.3412)
    assert screen.lines == [
        "evaluation at batch 50: loss 2.3145",
        "evaluation at batch 100: loss 2.0000, accuracy 34.12%",
    ]


def test_quiet_is_silent_on_a_terminal_and_elsewhere() -> None:
    for terminal in (True, False):
        screen = Screen(quiet=True, force_terminal=terminal)
        screen.display.note("hello")
        screen.report(50, after=60)
        screen.display.evaluation(50, 1.0, None)
        screen.display.close()
        assert screen.text == ""


def test_a_note_is_left_as_it_is() -> None:
    """No markup, no wrapping: a path in brackets is a path."""
    screen = Screen(width=20)
    note = "run     [bold]runs/a-rather-long-name-of-a-folder[/bold] :smile:"
    screen.display.note(note)
    assert screen.lines == [note]


# -- the table ---------------------------------------------------------------------------------------------------


def picture(screen: Screen) -> list[str]:
    """The last drawing: what stands after the last time the table was wiped."""
    return screen.text.split("\x1b[2K")[-1].replace("\x1b[?25h", "").strip("\r\n").splitlines()


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_says_it_all(width: int) -> None:
    screen = Screen(stages=3, total=600_000, width=width, force_terminal=True)
    screen.report(1, after=1)
    screen.display.evaluation(200_000, 2.3145, 0.3412)
    screen.report(300_000, after=1)
    screen.display.close()
    bar, pace, head, *rows, evaluation = (line.strip() for line in picture(screen))
    assert bar.startswith("batch 300000/600000 ━") and bar.endswith("50%  0:02 left")
    assert pace == "loss 2.2140   1530 samples/s"
    assert head.split("  ")[0] == "stage" and "norm ratio" in head and head.endswith("idle %")
    assert [row.split() for row in rows] == [
        ["0", "300000", "1530", "0.71", "0.84", "2.1", "2", "of", "4", "3"],
        ["1", "300000", "1530", "0.70", "0.84", "2.1", "2", "of", "4", "4"],
        ["2", "300000", "1530", "-", "-", "2.1", "2", "of", "4", "5"],
    ]
    assert evaluation == "evaluation at batch 200000: loss 2.3145, accuracy 34.12%"
    assert all(len(line) <= width for line in picture(screen))


def test_the_table_is_drawn_at_once_and_then_a_few_times_a_second() -> None:
    screen = Screen(stages=1, force_terminal=True)
    drawn = [screen.text.count("samples/s\r\n") + screen.text.count("samples/s\n")]
    for batch, after in enumerate((1, 0, REDRAW / 2, REDRAW / 2, REDRAW / 4), start=1):
        screen.report(batch, after=after)
        drawn.append(screen.text.count(" 1530 samples/s"))
    assert drawn == [0, 1, 1, 1, 2, 2]
    screen.display.close()


def test_the_last_picture_is_of_the_training_not_of_the_end() -> None:
    """The last interval is one of waiting and evaluating: 0 samples/s would be a strange thing to leave behind."""
    screen = Screen(stages=2, force_terminal=True)
    screen.report(100, after=1)
    screen.report(100, after=9, batches=0, samples_per_second=0, idle=0.97)
    assert any(row.split()[2] == "0" for row in picture(screen)[3:5])  # while it lasts, it is told
    screen.display.close()
    assert [row.split()[2] for row in picture(screen)[3:5]] == ["1530", "1530"]


def test_no_thread_draws_and_the_cursor_comes_back(no_threads: Callable[[], bool]) -> None:
    screen = Screen(force_terminal=True)
    screen.report(50, after=1)
    assert no_threads()
    screen.display.close()
    screen.display.close()
    assert screen.text.count("\x1b[?25l") == screen.text.count("\x1b[?25h") == 1
    assert no_threads()


def test_a_run_that_never_reported_leaves_nothing_to_close() -> None:
    for terminal in (True, False):
        screen = Screen(force_terminal=terminal)
        screen.display.close()
        assert screen.text == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_knows_ascii_only_does_not_end_the_run(terminal: bool) -> None:
    screen = Screen(stages=2, encoding="ascii", force_terminal=terminal)
    screen.display.note("stage 0 layers embed … block")
    screen.report(50, after=10)
    screen.display.evaluation(50, 2.0, 0.5)
    screen.report(60, after=10)
    screen.display.close()
    assert "layers embed ? block" in screen.text and "batch 60/100" in screen.text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(force_terminal=True)
    screen.report(50, after=10)
    assert len(screen.lines) == 1 and screen.lines[0].startswith("batch 50/100")


def test_a_prediction_that_is_not_used_stands_in_brackets() -> None:
    for at_once, shown in ((1.0, "cosine 0.71 -"), (0.2, "cosine (0.71) -")):
        screen = Screen(stages=2)
        screen.report(50, after=60, at_once=at_once)
        assert any(shown in line for line in screen.lines), screen.lines
