"""Key files: who may read them, what is made, revoked and checked, and what a stage reads of them."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
import zmq

from dnipipe import cli, keys
from dnipipe.errors import ConfigError
from dnipipe.keys import KeyRing


def run(*words: object) -> int:
    return cli.main(["keys", *map(str, words)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert list(keys.new(tmp_path / "keys", [0, 1, 2]))
    return tmp_path / "keys"


def test_secret_keys_are_for_their_owner_alone(folder: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder / "secret").iterdir()}
    assert modes == {f"stage-{k}-1.key": 0o600 for k in range(3)}
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o700


def test_a_pair_is_one_and_no_two_are_alike(folder: Path) -> None:
    pairs = [keys.own_pair(folder, k) for k in range(3)]
    assert len({public for public, _ in pairs}) == 3
    assert all(zmq.curve_public(secret) == public for public, secret in pairs)
    assert [KeyRing(folder, 0).keys(k) for k in range(4)] == [*([public] for public, _ in pairs), []]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_secret_key_that_others_may_read_is_refused(folder: Path, mode: int) -> None:
    path = folder / "secret" / "stage-1-1.key"
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"{path} has mode {mode:04o}.*chmod 600 {path}"):
        KeyRing(folder, 1)
    KeyRing(folder, 0)  # whose own is as it should be


def test_a_folder_that_nobody_may_write_to_will_do(folder: Path) -> None:
    for path in (folder, folder / "public", folder / "secret"):
        path.chmod(0o500)
    try:
        assert KeyRing(folder, 2).keys(0)
    finally:
        for path in (folder, folder / "public", folder / "secret"):
            path.chmod(0o700)


def test_one_stages_secret_alone_is_enough(folder: Path) -> None:
    for k in (0, 2):
        (folder / "secret" / f"stage-{k}-1.key").unlink()
    assert KeyRing(folder, 1).keys(2)
    with pytest.raises(ConfigError, match=r"no secret key of stage 2 in .*`dnipipe keys new .* --stage 2`"):
        KeyRing(folder, 2)


@pytest.mark.parametrize("text", ["", "short", "x" * 41, "ä" * 20, "\n" * 40])
def test_what_is_no_key_is_refused(folder: Path, text: str) -> None:
    (folder / "public" / "stage-2-1.key").write_text(text)
    with pytest.raises(ConfigError, match=r"stage-2-1\.key is no key: it should be one line of 40 characters"):
        KeyRing(folder, 1)


def test_two_halves_of_different_pairs_are_refused(folder: Path) -> None:
    (folder / "public" / "stage-1-1.key").write_bytes((folder / "public" / "stage-2-1.key").read_bytes())
    with pytest.raises(ConfigError, match="are not one pair"):
        KeyRing(folder, 1)


def test_the_newest_is_used_and_all_are_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "AGAIN", 0.0)
    neighbour = KeyRing(folder, 0)
    old = keys.own_pair(folder, 1)[0]
    assert list(keys.new(folder, [1]))
    new = keys.own_pair(folder, 1)[0]
    assert new != old and neighbour.keys(1) == [new, old]
    assert list(keys.revoke(folder, ["stage-1-1"]))
    assert neighbour.keys(1) == [new]


def test_a_file_that_is_being_copied_spoils_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "AGAIN", 0.0)
    ring = KeyRing(folder, 0)
    before = ring.keys(1)
    (folder / "public" / "stage-1-2.key").write_text("half a ke")
    assert ring.keys(1) == before


def test_without_the_folder_no_key_is_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "AGAIN", 0.0)
    ring = KeyRing(folder, 0)
    assert ring.keys(1)
    (folder / "public").rename(folder / "elsewhere")
    assert ring.keys(1) == []


# -- the command ---------------------------------------------------------------------------------------------------


def test_new_check_and_revoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert run("check", folder, "--stages", 2) == 2  # so that `check … || new …` makes them once
    assert run("new", folder, "--stages", 2) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*.key")}
    assert run("new", folder, "--stage", 1) == 0
    assert {path: path.read_bytes() for path in before} == before  # nothing that exists is touched
    assert run("check", folder, "--stages", 2) == 0
    assert run("revoke", folder, "stage-1-1") == 0
    capsys.readouterr()
    assert run("check", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["stage 0: public stage-0-1; secret stage-0-1", "stage 1: public stage-1-2; secret stage-1-2"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["new"], "give --stages K .* or --stage k"),
        (["new", "stage-1-1"], "cannot read 'stage-1-1'"),
        (["revoke"], "only revoke takes names, stage-2-1"),
        (["revoke", "stage-7-1"], "has no key 'stage-7-1' to revoke: it has stage-0-1, stage-1-1, stage-2-1"),
        (["revoke", "../secret/stage-1-1"], "has no key '../secret/stage-1-1' to revoke"),
        (["check", "--stages", "4"], "holds no key of stage 3: make one with `dnipipe keys new .* --stage 3`"),
    ],
)
def test_what_the_command_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert run(words[0], folder, *words[1:]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("new", tmp_path / "file", "--stages", 2) == 2
    assert "cannot write keys to" in capsys.readouterr().err
