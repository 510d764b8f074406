"""Who is blamed when processes end: by record, and by the real launcher on scripts of two lines. And a process's edge.

killed by a signal   before   said why (an error file)   before   just ended;   of equals the earliest
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dnipipe import process
from dnipipe.config import Config
from dnipipe.errors import CheckpointError, ConfigError, NonFiniteLoss, PeerLost, PeerStopped, RunError
from dnipipe.launcher import failure_line, first_failure, launch
from dnipipe.session import Job
from dnipipe.started import LAUNCHED, is_worker

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM  # as exit codes
Fail = Callable[..., ProcessFailure]


@pytest.fixture
def fail(tmp_path: Path) -> Fail:
    """A process that ended at second `at`; what it `says` is in its error file."""

    def made(rank: int, exitcode: int, says: str = "", at: int = 0) -> ProcessFailure:
        file = tmp_path / f"error-{rank}.json"
        if says:
            message = {"message": says, "extraInfo": {"py_callstack": "", "timestamp": str(at)}}
            file.write_text(json.dumps({"message": message}))
        failure = ProcessFailure(rank, 100 + rank, exitcode, str(file))
        failure.timestamp = at
        return failure

    return made


# -- the first failure -------------------------------------------------------------------------------------------


def test_the_killed_come_before_those_who_spoke_and_these_before_those_who_just_ended(fail: Fail) -> None:
    ended, spoke, killed = fail(0, 1, at=1), fail(1, 1, "RunError: x", at=2), fail(2, KILLED, at=3)
    assert first_failure({0: ended, 1: spoke, 2: killed}) is killed
    assert first_failure({0: ended, 1: spoke}) is spoke
    assert first_failure({0: ended}) is ended


@pytest.mark.parametrize(("exitcode", "says"), [(KILLED, ""), (1, "RunError: x"), (1, "")])
def test_of_equals_the_earliest(fail: Fail, exitcode: int, says: str) -> None:
    failures = {rank: fail(rank, exitcode, says, at) for rank, at in enumerate((7, 5, 6))}
    assert first_failure(failures).local_rank == 1


def test_a_stage_that_the_launcher_itself_ended_is_not_the_cause(fail: Fail) -> None:
    """It sends SIGTERM to all others once one has failed."""
    assert first_failure({0: fail(0, TERMINATED, at=1), 1: fail(1, 1, "RunError: x", at=2)}).local_rank == 1
    assert first_failure({0: fail(0, TERMINATED, at=1)}).local_rank == 0


def test_a_failure_is_told_by_stage_pid_and_cause(fail: Fail, tmp_path: Path) -> None:
    begins = "first failure: stage 2 (rank 2, pid 102): "
    assert failure_line(fail(2, KILLED)) == begins + "killed by SIGKILL"
    assert failure_line(fail(2, 3)) == begins + "ended with status 3"
    assert failure_line(fail(2, 1, "NonFiniteLoss: the loss is nan")) == begins + "NonFiniteLoss: the loss is nan"
    hurried = fail(2, TERMINATED, "RunError: x")  # it had said why, when the launcher ended it with the others
    assert failure_line(hurried) == begins + "RunError: x"
    unreadable = fail(2, 1, "RunError: x")
    Path(unreadable.error_file).write_text('{"message": "torn')
    assert failure_line(unreadable) == begins + "ended with status 1"


def test_a_worker_knows_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not is_worker()
    monkeypatch.setenv("RANK", "0")
    assert not is_worker()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_worker()


# -- the launcher ------------------------------------------------------------------------------------------------


class Script:
    """A program for two stages, in place of a pipeline's; and what launching it left."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capture = folder, capture

    def run(self, text: str) -> tuple[int, list[str]]:
        """(status, lines on stderr)"""
        path = self.folder / "script.py"
        path.write_text(f"import os, sys, signal, time\nrank = int(os.environ['RANK'])\n{text}\n")
        status = launch(2, [str(path), str(self.folder)], mark="a mark")
        return status, self.capture.readouterr().err.splitlines()

    def pid(self, rank: int) -> str:
        return (self.folder / f"pid-{rank}").read_text()


NOTES_PID = "open(f'{sys.argv[1]}/pid-{rank}', 'w').write(str(os.getpid()))\n"
BOTH_BEGUN = """
notes = [f'{sys.argv[1]}/pid-{other}' for other in (0, 1)]
while not all(os.path.exists(note) and os.path.getsize(note) for note in notes):
    time.sleep(0.01)
"""


@pytest.fixture
def script(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Script:
    logs = tmp_path / "temporary"
    logs.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(logs))
    return Script(tmp_path, capfd)


@pytest.mark.processes
def test_every_stage_runs_the_command_and_nothing_stays_behind(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment, the signal handlers, the temporary folder: a user's script goes on after its run."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, handlers = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "MASTER_ADDR", LAUNCHED)
    status, errors = script.run(f"open(f'{{sys.argv[1]}}/{{rank}}', 'w').write(repr([os.environ[n] for n in {names}]))")
    assert (status, errors) == (0, [])
    for rank in ("0", "1"):
        seen = (script.folder / rank).read_text()
        assert seen == repr([rank, "2", rank, "1", "127.0.0.1", "a mark"])
    assert dict(os.environ) == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert list((script.folder / "temporary").iterdir()) == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ends", "status", "cause"),
    [
        ("sys.exit(3)", 3, "ended with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "killed by SIGKILL"),
    ],
    ids=["status", "killed"],
)
def test_the_stage_that_ended_the_run_is_named_last(script: Script, ends: str, status: int, cause: str) -> None:
    """Stage 0 would go on for longer than this test may; the launcher ends it."""
    found, errors = script.run(f"{NOTES_PID}{BOTH_BEGUN}if rank == 1: {ends}\ntime.sleep(300)")
    assert found == status
    assert errors[-1] == f"dnipipe: first failure: stage 1 (rank 1, pid {script.pid(1)}): {cause}"
    assert not Path(f"/proc/{script.pid(0)}").exists()


@pytest.mark.processes
def test_a_signal_to_the_launcher_is_its_status(script: Script) -> None:
    status, _ = script.run("if rank == 1: os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(300)")
    assert status == 128 + signal.SIGTERM


# -- one process's edge ------------------------------------------------------------------------------------------


@pytest.fixture
def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    """Run a stage that ends with `error`: (status, what it left for the launcher)."""
    record = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(record))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv(LAUNCHED, raising=False)
    monkeypatch.setattr("faulthandler.enable", lambda **_: None)  # it is pytest's here
    job = Job(Config(), *[None] * 4)  # type: ignore[arg-type]  # never looked at

    def run(error: Exception | None, debug: bool = False) -> tuple[int, Any]:
        def work(job: Job, resume: bool, name: str) -> Path:
            if error is not None:
                raise error
            return Path("run")

        monkeypatch.setattr(process, "work", work)
        status, _ = process.guarded(job, debug=debug)
        return status, json.loads(record.read_text())["message"]["message"] if record.exists() else None

    return run


@pytest.mark.parametrize(("said", "threads"), [("", 1), ("3", 3), ("2,1", 2), ("all", None), ("0", None)])
def test_a_number_of_threads_is_one_or_refused(
    ending: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch, said: str, threads: int | None
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    status, recorded = ending(None)
    assert (status, asked) == ((0, [threads]) if threads else (2, []))
    assert threads or recorded == f"ConfigError: OMP_NUM_THREADS = '{said}': expected a whole number, at least 1"


@pytest.mark.parametrize(
    ("error", "status", "recorded"),
    [
        (None, 0, None),
        (ConfigError("no such thing"), 2, "ConfigError: no such thing"),
        (CheckpointError("none there"), 2, "CheckpointError: none there"),
        (NonFiniteLoss("it is nan"), 1, "NonFiniteLoss: it is nan"),
        (RunError("cannot save"), 1, "RunError: cannot save"),
        # a stage that lost its neighbour is not the cause
        (PeerLost("stage 1 has closed"), 1, None),
        (PeerStopped("stage 1: it is nan"), 1, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_was_foreseen_is_one_line_and_a_status(
    ending: Callable[..., tuple[int, Any]],
    error: Exception | None,
    status: int,
    recorded: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ending(error) == (status, recorded)
    assert capsys.readouterr().err == (f"dnipipe: stage 2: {error}\n" if error else "")


def test_what_was_not_foreseen_keeps_its_traceback(
    ending: Callable[..., tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(KeyError("h")) == (1, "KeyError: 'h'")
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1] == "dnipipe: stage 2: KeyError: 'h'"


def test_debug_shows_the_traceback_of_all(
    ending: Callable[..., tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(ConfigError("no such thing"), debug=True)[0] == 2
    assert "Traceback" in capsys.readouterr().err


def test_under_our_launcher_the_line_is_left_to_it(
    ending: Callable[..., tuple[int, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints the first failure once, and not that of every stage."""
    monkeypatch.setenv(LAUNCHED, "1")
    assert ending(RunError("cannot save")) == (1, "RunError: cannot save")
    assert capsys.readouterr().err == ""
