"""Whose a run's folder is: made by one, gone again if nothing came of it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dnipipe.config import Output
from dnipipe.errors import CheckpointError, ConfigError
from dnipipe.folders import LOCK, alone, begun, newest_run


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")


@pytest.mark.usefixtures("one_second")
def test_runs_that_begin_in_the_same_second_have_each_a_folder(tmp_path: Path) -> None:
    """Neither has written anything yet when the other begins."""
    output = Output(dir=str(tmp_path / "runs"))
    with begun(output, "100%d") as first, begun(output, "100%d") as second:
        assert (first.name, second.name) == ("100%d-20260101-120000", "100%d-20260101-120000-2")
        assert first.is_dir() and second.is_dir()
        (second / "summary.json").touch()
    assert list((tmp_path / "runs").iterdir()) == [second]  # the other was made here, and nothing was written into it


def test_a_folder_goes_again_only_if_the_run_made_it_and_left_it_empty(tmp_path: Path) -> None:
    for name in ("new", "there", "used"):
        folder = tmp_path / "above" / name
        if name == "there":
            folder.mkdir(parents=True)
        with pytest.raises(ConfigError, match="refused"), begun(Output(run=str(folder)), "x") as given:
            assert given == folder and folder.is_dir()
            if name == "used":
                (folder / "metrics").mkdir()
            raise ConfigError("refused")
    assert sorted(path.name for path in (tmp_path / "above").iterdir()) == ["there", "used"]


def test_a_resumed_run_is_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()
    with begun(Output(run=str(tmp_path / "nowhere")), "x", resume=True) as folder:
        assert not folder.exists()
    with begun(Output(run=str(tmp_path)), "x", resume=True) as folder:
        assert folder == tmp_path
    with pytest.raises(ConfigError, match="holds a run already"), begun(Output(run=str(tmp_path)), "x"):
        pass


def test_the_run_that_saved_last_is_found(tmp_path: Path) -> None:
    first = tmp_path / "first"
    with pytest.raises(CheckpointError, match=r"no run in .* --resume RUN"):
        newest_run(tmp_path)
    (first / "checkpoints" / "00000001").mkdir(parents=True)
    (first / "checkpoints" / "00000001" / "manifest.json").write_text("{}")
    assert newest_run(tmp_path) == first


# -- one run at a time -------------------------------------------------------------------------------------------


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    with alone(tmp_path):
        for _ in range(2):  # a run that was kept out takes nothing away from the one at work
            with pytest.raises(ConfigError) as refused, alone(tmp_path):
                raise AssertionError("two are at work")
            assert str(refused.value).startswith(
                f"output.run = {tmp_path}: another run is at work in this folder: wait"
            )
    assert list(tmp_path.iterdir()) == []
    with alone(tmp_path):
        pass


def test_another_process_is_kept_out_and_one_that_was_killed_keeps_nobody_out(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, dnipipe.folders as f\nwith f.alone(pathlib.Path(sys.argv[1])): print(1); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    with pytest.raises(ConfigError, match="another run is at work"), alone(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / LOCK).exists()  # which is no lock
    with alone(tmp_path):
        pass


def test_a_child_that_is_forked_holds_nobody_out(tmp_path: Path) -> None:
    """As the workers of a DataLoader, which outlive a run that was killed by seconds."""
    stays, goes = os.pipe()
    with alone(tmp_path):
        child = os.fork()
        if not child:
            os.close(goes)
            os.read(stays, 1)
            os._exit(0)
    try:
        with alone(tmp_path):
            pass
    finally:
        os.close(goes)
        os.waitpid(child, 0)
        os.close(stays)


def test_a_lock_on_a_file_that_was_taken_away_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before ends between this one's opening the file and its locking it; and yet a third is kept out."""
    real = fcntl.flock
    gone = []

    def flock(descriptor: int, how: int) -> None:
        if not gone:
            gone.append(os.fstat(descriptor).st_ino)
            (tmp_path / LOCK).unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path):
        assert gone and (tmp_path / LOCK).exists()
        with pytest.raises(ConfigError, match="another run is at work"), alone(tmp_path):
            pass


def test_without_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    with alone(tmp_path / "not there"):  # what else is wrong there, others say better
        pass
    monkeypatch.setattr(fcntl, "flock", none)
    with alone(tmp_path), alone(tmp_path):
        pass
