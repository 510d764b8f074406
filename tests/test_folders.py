"""Whose a run's folder is: made by one, gone again if nothing came of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnipipe.config import Output
from dnipipe.errors import CheckpointError, ConfigError
from dnipipe.folders import begun, newest_run


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
