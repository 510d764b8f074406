"""The ledger: what may not be is found, what is missing has a reason, and one process at a time writes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dnipipe.errors import Replaced, RunError, TraceError
from dnipipe.service.ledger import NAME, Account, Ledger, read, unexplained
from dnipipe.stage import OVERFLOWN, POISONED


def opened(folder: Path, incarnation: int = 1, begin: int = 0) -> Ledger:
    return Ledger(folder / NAME, incarnation, begin)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    one = opened(tmp_path)
    for batch in (1, 2, 3):
        one.begun(batch, drawn=batch == 2)
    one.alone(3)
    one.skipped(2, "loss not finite")
    one.gone(2, "its process ended", [3])
    one.back(2, 1)
    one.ended()
    one.close()
    found = read(tmp_path / NAME)
    assert (
        found.begun == [1, 2, 3]
        and found.alone == {3}
        and found.drawn == {2}
        and found.skipped == {2: "loss not finite"}
    )
    assert found.lost == {2, 3}  # unanswered, and behind what the other had begun
    assert [sorted(line)[0] for line in found.away] == ["gone", "back"] and found.ended
    assert len(found.times) == 3 and found.times == sorted(found.times)


def test_a_later_start_counts_on_and_says_what_is_undone(tmp_path: Path) -> None:
    one = opened(tmp_path)
    for batch in range(1, 8):
        one.begun(batch)
    one.close()
    two = opened(tmp_path, 2, 4)
    assert two.last == 7
    two.begun(8)
    two.close()
    found = read(tmp_path / NAME)
    assert found.undone == 3 and list(found.violations()) == []
    assert [(start["start"], start["from"], start["before"]) for start in found.starts] == [(1, 0, 0), (2, 4, 7)]


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        ([1, 2, 3], []),
        ([1, 2, 2], ["batch 2 was trained twice"]),
        ([1, 3, 2], ["batch 2 was trained after batch 3"]),
        ([2, 1, 2], ["batch 1 was trained after batch 2", "batch 2 was trained twice"]),
    ],
)
def test_a_batch_that_is_trained_twice_or_late_is_a_violation(begun: list[int], said: list[str]) -> None:
    assert list(Account(begun=begun).violations()) == said


@pytest.mark.parametrize(
    ("before", "after", "gaps"),
    [
        (Account(begun=[1, 2, 3]), Account(begun=[1, 2, 3]), []),
        (Account(begun=[1, 2, 3]), Account(begun=[1, 3]), [2]),
        (Account(begun=[1, 2, 3], alone={2}), Account(begun=[1, 3]), []),
        (Account(begun=[1, 2, 3], lost={2}), Account(begun=[1, 3]), []),
        (Account(begun=[1, 2, 3], skipped={2: POISONED}), Account(begun=[1, 3]), []),
        (Account(begun=[1, 2, 3], skipped={2: OVERFLOWN}), Account(begun=[1, 3]), []),
        (Account(begun=[1, 2, 3], skipped={2: "no gradient came"}), Account(begun=[1, 3]), [2]),
        (Account(begun=[1, 3]), Account(begun=[1, 2, 3]), [2]),
        (Account(begun=[1, 2], lost={2}), Account(begun=[1, 2]), []),  # it arrived after all
        (Account(begun=[1]), Account(begun=[1, 2, 3], drawn={2}), [3]),
    ],
)
def test_a_gap_between_two_stages_needs_a_reason(before: Account, after: Account, gaps: list[int]) -> None:
    assert unexplained(before, after) == gaps


def test_a_process_that_was_replaced_writes_nothing_more(tmp_path: Path) -> None:
    older = opened(tmp_path)
    older.begun(1)
    newer = opened(tmp_path, 2)
    newer.begun(2)
    before = (tmp_path / NAME).read_bytes()
    for write in (lambda: older.begun(2), lambda: older.alone(1), older.ended):
        with pytest.raises(Replaced, match="incarnation 1 of the stage ends"):
            write()
    assert (tmp_path / NAME).read_bytes() == before and older.last == 1
    newer.begun(3)
    older.close()
    newer.close()
    assert list(read(tmp_path / NAME).violations()) == []


def test_a_process_that_starts_while_another_writes_is_told_so(tmp_path: Path) -> None:
    older = opened(tmp_path)
    with older._alone(RunError), pytest.raises(RunError, match="another process writes"):
        opened(tmp_path, 2)
    newer = opened(tmp_path, 2)
    with newer._alone(RunError), pytest.raises(Replaced, match="another process writes"):
        older.begun(1)


def test_a_line_cut_short_by_a_kill_is_taken_away(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.begun(1)
    one.close()
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"begun": 2, "ti')
    two = opened(tmp_path, 2, 1)
    assert two.last == 1
    two.begun(2)
    two.close()
    assert read(tmp_path / NAME).begun == [1, 2]


def test_a_full_disk_is_a_clear_error_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = opened(tmp_path)
    one.begun(1)
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: real(file, data[:5]))  # room for five bytes
        with pytest.raises(RunError, match=f"cannot write .*{NAME}: no room for a whole line"):
            one.begun(2)
    assert one.last == 1
    one.begun(2)  # there is room again
    one.close()
    assert read(tmp_path / NAME).begun == [1, 2]


def test_a_line_that_is_none_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / NAME
    for line in ("no JSON", json.dumps({"what": 1}), json.dumps({"begun": "x", "time": 0}), json.dumps([1])):
        path.write_text(json.dumps({"begun": 1, "time": 0.0}) + f"\n{line}\n")
        with pytest.raises(TraceError, match=f"{NAME}, line 2: not a line of a ledger"):
            read(path)
