"""The supervisor: what is started again, when, and what ends it. Its stages are a line each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from dnipipe.service import supervisor
from dnipipe.service.supervisor import supervise

pytestmark = [
    pytest.mark.processes,
    # pytest's process has threads by then; the supervisor's own has none
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


class Waits:
    """In the place of Event: the waits that were asked for, and none of them waited."""

    asked: list[float]

    def wait(self, seconds: float) -> None:
        self.asked.append(seconds)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    Waits.asked = []
    monkeypatch.setattr(supervisor, "Event", Waits)
    return Waits.asked


def counting(path: Path, *ends: str) -> Callable[[], int]:
    """Ends as the first of these says at its first start, as the second at its second, ..."""
    return partial(_count, path, ends)


def _count(path: Path, ends: Sequence[str]) -> int:
    n = len(path.read_text()) if path.exists() else 0
    path.write_text("x" * (n + 1))
    exec(ends[n])
    raise AssertionError(f"{ends[n]} did not end it")


def starts(path: Path) -> int:
    return len(path.read_text())


def test_where_it_cannot_fork_each_process_is_a_new_interpreter(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    monkeypatch.setattr(supervisor, "FORKS", False)
    monkeypatch.setattr(supervisor, "CALM", 0.5)  # which is known here only
    saw = "path.with_name('saw').write_text(str(supervisor.CALM)); os._exit(0)"
    assert supervise(counting(tmp_path / "n", "os.kill(os.getpid(), signal.SIGKILL)", saw), 1, 5) == 0
    assert starts(tmp_path / "n") == 2 and (tmp_path / "saw").read_text() == "10.0"


@pytest.mark.parametrize("status", [0, 2, 3])
def test_a_status_that_is_final_ends_it(tmp_path: Path, waits: list[float], status: int) -> None:
    assert supervise(counting(tmp_path / "n", f"os._exit({status})"), 1, 5) == status
    assert starts(tmp_path / "n") == 1 and waits == []


def test_that_a_process_hung_is_said(tmp_path: Path, waits: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    lived: list[float] = []

    def stood(seconds: float) -> str:
        lived.append(seconds)
        return "stage 1 has not moved for 61 s, its limit is 60 s (service.hung)"

    assert supervise(counting(tmp_path / "n", "os._exit(1)", "os._exit(0)"), 1, 9, stood) == 0
    said = capfd.readouterr().err
    assert "stage 1: ended with status 1; stage 1 has not moved for 61 s, its limit is 60 s (service.hung); " in said
    assert len(lived) == 1 and lived[0] > 0


def test_a_crash_is_started_again_at_once_and_the_next_ones_later(
    tmp_path: Path, waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    dies = ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(7)", "os._exit(1)"]
    assert supervise(counting(tmp_path / "n", *dies, "os._exit(0)"), 1, 9) == 0
    assert starts(tmp_path / "n") == 5 and waits == [0, 1, 2, 4]
    said = capfd.readouterr().err
    assert "stage 1: ended with status 1; started again at once (at most 9 times more)" in said
    assert "stage 1: killed by SIGKILL; started again in 1 s (at most 8 times more)" in said


def test_one_that_lived_is_started_at_once_again(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "CALM", 0.0)
    assert supervise(counting(tmp_path / "n", *["os._exit(1)"] * 4, "os._exit(0)"), 1, 9) == 0
    assert waits == [0, 0, 0, 0]


def test_waits_grow_to_a_limit(tmp_path: Path, waits: list[float]) -> None:
    supervise(counting(tmp_path / "n", *["os._exit(1)"] * 9), 1, 8)
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]


def test_restarts_are_used_up(tmp_path: Path, waits: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(counting(tmp_path / "n", *["os._exit(1)"] * 3), 1, 2) == 1
    assert starts(tmp_path / "n") == 3
    assert "service.restarts is used up" in capfd.readouterr().err


def test_a_stage_begins_as_any_process_does(tmp_path: Path) -> None:
    """In a session of its own, with nobody else's handlers, and hearing every signal; so do all that follow it."""
    notes = (
        "import json; path.with_name(f'saw-{n}').write_text(json.dumps([os.getsid(0) == os.getpid(), "
        "[str(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)], list(signal.pthread_sigmask(0, [])), "
        "os.environ['OMP_NUM_THREADS']])); os._exit(STATUS)"
    )
    own = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    assert supervise(counting(tmp_path / "n", notes.replace("STATUS", "1"), notes.replace("STATUS", "0")), 1, 5) == 0
    new = [True, [str(signal.SIG_DFL), str(signal.default_int_handler)], [], os.environ["OMP_NUM_THREADS"]]
    assert [json.loads((tmp_path / f"saw-{n}").read_text()) for n in range(2)] == [new, new]
    assert {number: signal.getsignal(number) for number in own} == own


@pytest.mark.skipif(not supervisor.FORKS, reason="here each process is a new interpreter")
def test_what_takes_long_to_import_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "takes_long.py").write_text("import os; where = os.getpid()")
    monkeypatch.syspath_prepend(tmp_path)
    uses = "import takes_long; path.with_name(f'saw-{n}').write_text(str(takes_long.where)); os._exit(STATUS)"
    part = counting(tmp_path / "n", uses.replace("STATUS", "1"), uses.replace("STATUS", "0"))
    try:
        assert supervise(part, 1, 5, imports=["takes_long", "is_not_there"]) == 0
    finally:
        sys.modules.pop("takes_long", None)
    assert [(tmp_path / f"saw-{n}").read_text() for n in range(2)] == [str(os.getpid())] * 2


SLEEPS = """
import os, pathlib, signal, sys, time
from dnipipe.service.supervisor import supervise

def stage():
    pathlib.Path({path!r}).write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs this may ignore it
    sys.exit(supervise(stage, 1, 5))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_wish_to_end_is_passed_on_and_nothing_stays(tmp_path: Path, number: int) -> None:
    """SIGHUP is one: the terminal was closed."""
    program = tmp_path / "program.py"
    program.write_text(SLEEPS.format(path=str(tmp_path / "pid")))
    process = subprocess.Popen([sys.executable, program])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("before", "asks"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_under_nohup_the_end_of_the_terminal_is_no_wish(before: signal.Handlers, asks: bool) -> None:
    own = signal.signal(signal.SIGHUP, before)
    try:
        assert (signal.SIGHUP in supervisor._asking()) is asks
    finally:
        signal.signal(signal.SIGHUP, own)
