"""A stage's own state: saved, or told that it is not; never a newer process's overwritten."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dnipipe import checkpoint
from dnipipe.config import build
from dnipipe.errors import (
    DataError,
    GaveUp,
    HandshakeError,
    NonFiniteLoss,
    PeerLost,
    PeerStopped,
    Replaced,
    RunError,
    WaitTimeout,
)
from dnipipe.jobs import job_of
from dnipipe.service import session
from dnipipe.service.place import Place
from dnipipe.service.supervisor import FINAL
from tests.checkpoint.disk import die_at
from tests.checkpoint.states import folders, small


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """at(batch): save stage 1, whose last batch that is."""
    monkeypatch.setattr(session, "state_of", lambda stage, plan: small(stage.last_batch, stages=1)[0])
    place, agreed = Place.taken(tmp_path, 1), SimpleNamespace(plan=None)
    return lambda batch: session._save(SimpleNamespace(index=1, last_batch=batch), agreed, place)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [WaitTimeout, PeerStopped, HandshakeError, NonFiniteLoss])
def test_what_another_start_would_meet_again_is_no_crash(monkeypatch: pytest.MonkeyPatch, kind: type[RunError]) -> None:
    job: Any = None

    def fails(error: RunError) -> None:
        def serves(*_: object) -> Path:
            raise error

        monkeypatch.setattr(session, "_serve", serves)

    fails(kind("as it was"))
    with pytest.raises(GaveUp, match=r"^as it was$") as raised:
        session.serve(job, 1)
    assert raised.value.exit_status in FINAL
    fails(PeerLost("its starter is gone"))
    with pytest.raises(PeerLost):
        session.serve(job, 1)


@pytest.mark.parametrize(("index", "guesses", "refused"), [(1, True, True), (1, False, False), (0, True, False)])
def test_data_that_a_stage_is_to_draw_from_are_looked_for_before_anyone_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, guesses: bool, refused: bool
) -> None:
    class Opened(Exception):
        """It goes on to its neighbours."""

    def opens(*_: object) -> None:
        raise Opened

    monkeypatch.setattr(session, "_opened", opens)
    rule = {"name": "synthetic", "forward_unlock": guesses}
    service = {"addresses": ("127.0.0.1:7000", "127.0.0.1:7001")}
    data = {"name": "text", "root": str(tmp_path / "none.txt")}
    run = {"pipeline": {"stages": 3}, "output": {"run": str(tmp_path)}}
    settings = build({"rule": rule, "service": service, "data": data, **run})
    with pytest.raises(DataError if refused else Opened):
        session.serve(job_of(settings), index)


def newest(run: Path) -> int:
    return checkpoint.newest(run / "stage-1").batch


def test_the_newest_two_states_are_kept_and_none_is_saved_twice(tmp_path: Path, at: Any) -> None:
    assert at(0) and not (tmp_path / "stage-1" / "checkpoints").exists()  # nothing to save yet
    for batch in (5, 9, 9, 14):
        assert at(batch)
    assert folders(tmp_path / "stage-1") == [9, 14]


@pytest.mark.parametrize("step", range(1, 13))
def test_a_disk_that_takes_no_state_is_told_and_the_stage_goes_on(
    tmp_path: Path, at: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], step: int
) -> None:
    assert at(5)
    with monkeypatch.context() as patch:
        die_at(patch, step, OSError(errno.ENOSPC, "No space left on device"))
        assert not at(9)
    assert "stage 1: cannot" in (said := capfd.readouterr().err) and "No space left on device" in said
    assert newest(tmp_path) in (5, 9)
    assert not list(tmp_path.rglob("*.tmp")) and folders(tmp_path / "stage-1")[-1] == newest(tmp_path)  # no half one
    assert at(14) and newest(tmp_path) == 14


def test_a_process_that_was_replaced_saves_nothing(tmp_path: Path, at: Any) -> None:
    assert at(5)
    Place.taken(tmp_path, 1)
    with pytest.raises(Replaced):
        at(9)
    assert folders(tmp_path / "stage-1") == [5]


def test_that_no_state_of_its_own_can_be_loaded_is_told(
    tmp_path: Path, at: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    place, stage = Place.taken(tmp_path, 1), SimpleNamespace(index=1)
    assert session._restore(stage, None, place) == 0  # type: ignore[arg-type]
    assert capfd.readouterr().err == ""  # there was none yet
    (place.folder / "checkpoints" / "00000005").mkdir(parents=True)
    assert session._restore(stage, None, place) == 0  # type: ignore[arg-type]
    assert "stage 1: begins with its initial weights: " in capfd.readouterr().err
