"""What a stage did with each batch, so that it can be shown afterwards: each id at most once, every gap explained.

    {"start": 1764…2, "from": 80, "before": 97, "time": 1764…}      one more start: it goes on from its state behind
                                               batch 80; it had begun 97, so what 81 to 97 taught it is undone
    {"begun": 98, "time": 1764…}               written before the batch is trained: a kill loses no line
    {"begun": 98, "time": 1764…, "drawn": true}   the same, of a batch that was drawn here (drawing.py)
    {"skipped": 98, "why": "loss not finite"}  nothing was learnt from it
    {"alone": 99}                              trained, but its activation went nowhere: the next stage was away
    {"gone": 2, "why": "…", "unanswered": [97, 98], "time": 1764…}      the neighbour went away, owing these an answer
    {"back": 2, "last": 90, "time": 1764…}     it is there (again), and 90 is the last that it trained: what was sent
                                               to it behind 90 is lost; null where the stage before is meant
    {"end": 600}                               the run's last batch has passed

One line a batch, handed to the kernel before the batch is begun: what the process did is known however it ends. A
process that was replaced writes nothing more: it finds a line that is not its own, and ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnipipe.errors import Replaced, RunError, TraceError
from dnipipe.stage import OVERFLOWN, POISONED

NAME = "ledger.jsonl"


class Ledger:
    """Where one stage writes. `last` is the highest id that it ever began, in any start.

    Args:
        path: the file; made if it is not there. incarnation: which start of the stage this is.
        begin: it goes on from its state behind this batch.
    """

    def __init__(self, path: Path, incarnation: int, begin: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.incarnation = path, incarnation
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with self._alone(RunError):  # an older process cannot write between what is read here and the first line
            _mend(self._file)
            self.last = read(path).last
            self._size = os.fstat(self._file).st_size
            self._append({"start": incarnation, "from": begin, "before": self.last, "time": time.time()})

    def begun(self, batch: int, drawn: bool = False) -> None:
        """drawn: the stage before was away, and did not begin it."""
        line = {"begun": batch, "time": round(time.time(), 3)}
        self._write(line | {"drawn": True} if drawn else line)
        self.last = batch

    def alone(self, batch: int) -> None:
        self._write({"alone": batch})

    def skipped(self, batch: int, why: str) -> None:
        self._write({"skipped": batch, "why": why})

    def gone(self, stage: int, why: str, unanswered: list[int]) -> None:
        self._write({"gone": stage, "why": why, "unanswered": unanswered, "time": time.time()})

    def back(self, stage: int, last: int | None) -> None:
        self._write({"back": stage, "last": last, "time": time.time()})

    def ended(self) -> None:
        self._write({"end": self.last})

    def _write(self, line: dict[str, Any]) -> None:
        """Raises Replaced if another process has written since, RunError if the line cannot be written."""
        with self._alone(Replaced):
            if os.fstat(self._file).st_size != self._size:
                raise Replaced(f"a newer process writes {self.path}: incarnation {self.incarnation} of the stage ends")
            self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            written = os.write(self._file, data)  # one call a line, unbuffered
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}; nothing is trained unwritten") from error
        if written < len(data):
            os.ftruncate(self._file, self._size)
            raise RunError(f"cannot write {self.path}: no room for a whole line; nothing is trained unwritten")
        self._size += written

    @contextmanager
    def _alone(self, otherwise: type[RunError]) -> Iterator[None]:
        """No other process writes meanwhile. Raises `otherwise` if one does: it might hang, and is not waited for."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise otherwise(f"another process writes {self.path} at this moment: this one ends") from None
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._file)


def _mend(file: int) -> None:
    """Take away what follows the last whole line: what it was to say was not begun."""
    size = os.fstat(file).st_size
    whole = os.pread(file, size, 0).rfind(b"\n") + 1
    if whole < size:
        os.ftruncate(file, whole)


@dataclass
class Account:
    """What a ledger says of one stage."""

    begun: list[int] = field(default_factory=list)  # ids, in order
    times: list[float] = field(default_factory=list)  # when each of them was begun, seconds since 1970
    alone: set[int] = field(default_factory=set)
    drawn: set[int] = field(default_factory=set)  # here, while the stage before was away
    skipped: dict[int, str] = field(default_factory=dict)
    starts: list[dict[str, float]] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)  # sent, or about to be, when a connection to the next stage ended
    away: list[dict[str, Any]] = field(default_factory=list)  # gone and back, in order
    ended: bool = False

    @property
    def last(self) -> int:
        return max(self.begun, default=0)

    @property
    def undone(self) -> int:
        """Batches whose lessons a restart lost."""
        return sum(len([b for b in self.begun if s["from"] < b <= s["before"]]) for s in self.starts)

    def violations(self) -> Iterator[str]:
        """What must not be."""
        seen: set[int] = set()
        highest = 0
        for batch in self.begun:
            if batch in seen:
                yield f"batch {batch} was trained twice"
            elif batch < highest:
                yield f"batch {batch} was trained after batch {highest}"
            seen.add(batch)
            highest = max(highest, batch)


def read(path: Path) -> Account:
    """The ledger of one stage. Raises TraceError for a line that is none; the last one may be cut short by a kill."""
    found = Account()
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines[:-1], start=1):
        try:
            _take(found, json.loads(text))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise TraceError(f"{path}, line {number}: not a line of a ledger ({error!r})") from None
    return found


def _take(found: Account, line: dict[str, Any]) -> None:
    if "begun" in line:
        found.begun.append(int(line["begun"]))
        found.times.append(float(line["time"]))
        if line.get("drawn"):
            found.drawn.add(int(line["begun"]))
    elif "alone" in line:
        found.alone.add(int(line["alone"]))
    elif "skipped" in line:
        found.skipped[int(line["skipped"])] = str(line["why"])
    elif "start" in line:
        found.starts.append({key: line[key] for key in ("start", "from", "before", "time")})
    elif "gone" in line or "back" in line:
        found.away.append(line)
        found.lost.update(line.get("unanswered", ()))
        if line.get("last") is not None:
            found.lost.update(batch for batch in found.begun if batch > line["last"])
    elif "end" in line:
        found.ended = True
    else:
        raise KeyError("none of the known keys")


def unexplained(before: Account, after: Account) -> list[int]:
    """Ids that a stage trained and the one behind it did not, without a reason in the first one's ledger.

    A reason: what came, or was made of it, was not finite, so nothing was sent; the next stage was away when the batch
    was sent; or a connection ended, and then it owed an answer to the batch, or had not begun it when the next
    connection was made.
    Also ids that only the second one has, and did not draw itself.
    """
    unsent = {batch for batch, why in before.skipped.items() if why in (POISONED, OVERFLOWN)}
    missing = set(before.begun) - set(after.begun) - before.alone - before.lost - unsent
    return sorted(missing | set(after.begun) - set(before.begun) - after.drawn)


__all__ = ["NAME", "Account", "Ledger", "read", "unexplained"]
