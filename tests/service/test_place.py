"""Where a stage lives: its starts are counted, a newer process is seen, damage is refused by name."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from dnipipe.config import build
from dnipipe.errors import CheckpointError, ConfigError, Replaced, RunError
from dnipipe.service.limits import Limit
from dnipipe.service.place import ALIVE, START, Place, check, check_free, endpoint, own_endpoint, stood, unhealthy
from dnipipe.service.supervisor import FINAL


def test_every_start_is_counted_and_what_the_stage_is_part_of_is_kept(tmp_path: Path) -> None:
    first = Place.taken(tmp_path, 1)
    assert (first.folder, first.first, first.agreement) == (tmp_path / "stage-1", True, "")
    first.joined("the agreement")
    second = Place.taken(tmp_path, 1)
    assert (second.incarnation, second.agreement) == (first.incarnation + 1, "the agreement")
    assert not second.first


def test_a_folder_that_was_removed_begins_behind_every_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbours have heard those, and take a lower number for an older process."""
    monkeypatch.setattr(time, "time", lambda: 1764000000.9)
    before = [Place.taken(tmp_path, 1) for _ in range(4)]
    monkeypatch.setattr(time, "time", lambda: 1764000060.1)
    shutil.rmtree(before[-1].folder)
    anew = Place.taken(tmp_path, 1)
    assert [place.first for place in (*before, anew)] == [True, False, False, False, True]
    assert anew.incarnation > max(place.incarnation for place in before)


def test_a_clock_that_is_set_back_counts_nothing_backwards_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Place.taken(tmp_path, 1)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert Place.taken(tmp_path, 1).incarnation == first.incarnation + 1


def test_a_run_that_is_over_is_over_for_whoever_is_started_once_more(tmp_path: Path) -> None:
    first = Place.taken(tmp_path, 1)
    first.joined("the agreement")
    first.ended()
    again = Place.taken(tmp_path, 1)
    assert again.over and (again.incarnation, again.agreement) == (first.incarnation + 1, "the agreement")


def test_a_process_sees_that_a_newer_one_has_its_place(tmp_path: Path) -> None:
    older = Place.taken(tmp_path, 1)
    older.check()
    Place.taken(tmp_path, 2).check()  # of another stage
    newer = Place.taken(tmp_path, 1)
    newer.check()
    said = f"stage 1, incarnation {older.incarnation}, ends: {newer.incarnation} has taken its place"
    with pytest.raises(Replaced, match=said):
        older.check()


@pytest.mark.parametrize("change", ["cut", "flip", "other"])
def test_a_damaged_note_is_refused_by_name(tmp_path: Path, change: str) -> None:
    Place.taken(tmp_path, 1).joined("the agreement")
    path = tmp_path / "stage-1" / START
    text = path.read_bytes()
    damaged = {"cut": text[:-9], "flip": text.replace(b"the agreement", b"another one"), "other": b"[1, 2]"}
    path.write_bytes(damaged[change])
    with pytest.raises(CheckpointError, match=rf"{START} is damaged .*remove .*stage-1"):
        Place.taken(tmp_path, 1)


def test_a_damaged_note_of_stage_0_is_the_end_of_the_run(tmp_path: Path) -> None:
    """Made anew it would decide for another one, and the others would refuse it."""
    Place.taken(tmp_path, 0)
    (tmp_path / "stage-0" / START).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{START} is damaged .*begin another, and name its output.run"):
        Place.taken(tmp_path, 0)


def test_a_note_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Place.taken(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match=f"cannot write .*{START}: No space left"):
            Place.taken(tmp_path, 0)
    assert Place.taken(tmp_path, 0).incarnation == first.incarnation + 1


def test_a_stage_is_healthy_while_its_loop_goes_round(tmp_path: Path) -> None:
    assert "has not begun" in unhealthy(tmp_path, 0, 60)
    mine = Place.taken(tmp_path, 0)
    mine.touch(Limit(60.0, "service.hung"))
    assert unhealthy(tmp_path, 0, 60) == ""
    past = time.time() - 100
    os.utime(mine.folder / ALIVE, (past, past))
    assert "has not moved for 100 s" in unhealthy(tmp_path, 0, 60)


@pytest.mark.parametrize(
    ("note", "why"),
    [
        ("80.0 4 times its longest step of late, 20 s", "80 s (4 times its longest step of late, 20 s)"),
        ("120.0 4 times its longest step of late, 30 s", ""),
        ("", "60 s (service.hung)"),  # the disk was full
    ],
)
def test_how_long_it_may_stand_is_what_it_has_noted(tmp_path: Path, note: str, why: str) -> None:
    mine = Place.taken(tmp_path, 0)
    (mine.folder / ALIVE).write_text(note)
    past = time.time() - 100
    os.utime(mine.folder / ALIVE, (past, past))
    assert unhealthy(tmp_path, 0, 60) == (f"stage 0 has not moved for 100 s, its limit is {why}" if why else "")


def test_a_note_on_a_full_disk_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Place.taken(tmp_path, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        mine.touch(Limit(80.0, "measured"))
    assert unhealthy(tmp_path, 0, 60) == ""
    mine.touch(Limit(80.0, "measured"))
    assert (mine.folder / ALIVE).read_text() == "80.0 measured"


def test_a_process_that_ended_within_its_limit_did_not_hang(tmp_path: Path) -> None:
    """What it is judged by may be from the process before it."""
    assert stood(tmp_path, 0, 60) == ""
    mine = Place.taken(tmp_path, 0)
    mine.touch(Limit(80.0, "measured"))
    past = time.time() - 100
    os.utime(mine.folder / ALIVE, (past, past))
    assert stood(tmp_path, 0, 60, 90.0) == ""
    assert stood(tmp_path, 0, 60, 110.0) == "stage 0 has not moved for 100 s, its limit is 80 s (measured)"


@pytest.mark.parametrize(
    ("settings", "index", "named"),
    [
        ({}, 3, "--index 3 with pipeline.stages = 3"),
        ({"service": {"addresses": ["a:1"]}}, 0, "give 2 different"),
        ({"service": {"addresses": ["a:1", "a:1"]}}, 0, "give 2 different"),
        ({"transport": {"kind": "local"}}, 0, "transport.kind = local"),
        ({"rule": {"name": "sync"}}, 0, "rule.name = sync"),
    ],
)
def test_what_independent_stages_cannot_run_is_refused(
    settings: dict[str, dict[str, object]], index: int, named: str
) -> None:
    values = {"pipeline": {"stages": 3}, "service": {"addresses": ["a:1", "b:1"]}, **settings}
    with pytest.raises(ConfigError, match=named):
        check(build(values), index)


def test_addresses_become_endpoints(tmp_path: Path) -> None:
    assert endpoint("host:7000") == "tcp://host:7000" and endpoint("/run/edge") == "ipc:///run/edge"
    assert own_endpoint("127.0.0.1:7000", "") == "tcp://127.0.0.1:7000"
    assert own_endpoint("somewhere:7000", "10.0.0.1") == "tcp://10.0.0.1:7000"
    assert own_endpoint(f"{tmp_path}/edge", "") == f"ipc://{tmp_path}/edge"


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [(socket.EAI_NONAME, ConfigError, "here"), (socket.EAI_AGAIN, RunError, "here yet")],
    ids=["unknown", "nobody to ask"],
)
def test_a_name_that_cannot_be_asked_for_yet_is_no_mistake_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], said: str
) -> None:
    """A machine that starts may have no name service yet: so the supervisor tries again."""

    def asked(*_: object, **__: object) -> None:
        raise socket.gaierror(number, "as the resolver says")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    with pytest.raises(kind, match=rf"stage-2 has no address {said} \(.* set transport.address") as caught:
        own_endpoint("stage-2:7000", "")
    assert type(caught.value) is kind


def test_an_address_that_is_taken_is_no_mistake_of_the_settings() -> None:
    """Its holder may be an older process of the stage, which ends: so the supervisor tries again."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RunError, match=f"{address} is taken: .* mend service.addresses") as caught:
            check_free(address)
        assert caught.value.exit_status not in FINAL
    check_free(address)


def test_a_socket_file_that_somebody_listens_on_is_taken_and_left_to_him(tmp_path: Path) -> None:
    file = tmp_path / "edge"
    check_free("ipc:///nowhere/edge")
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(file))
        taken.listen(0)
        for _ in range(3):  # his queue of connections being full changes nothing
            with pytest.raises(RunError, match=f"ipc://{file} is taken: .* mend service.addresses") as caught:
                check_free(f"ipc://{file}")
            assert caught.value.exit_status not in FINAL and file.is_socket()
    check_free(f"ipc://{file}")  # what a killed process has left
    assert not file.exists()


def test_a_file_that_is_no_socket_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    notes, folder, leads_nowhere = tmp_path / "notes.txt", tmp_path / "folder", tmp_path / "link"
    notes.write_text("mine")
    folder.mkdir()
    leads_nowhere.symlink_to(tmp_path / "later")
    for path in (notes, folder, leads_nowhere):
        with pytest.raises(ConfigError, match=f"{path} is to be a socket file, and what lies there is none"):
            check_free(own_endpoint(str(path), ""))
    assert notes.read_text() == "mine" and folder.is_dir() and leads_nowhere.is_symlink()
