"""One process's part of a trace: spans and messages as lines of JSON, in RUN/trace/stage-K.jsonl (docs/files.md).

{"trace": 1, "stage": 1, "stages": 4, "clock": "…"}     which machine's clock the times are of
["forward", 5120031422, 5121544170, 17]                 a span: begin and end in nanoseconds, batch id or 0
[">", 2, "Activation", 17, 5121550907]                  a message to stage 2; "<" is one from it
{"spans": 812, "messages": 260, "dropped": 0}           the end
"""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from pathlib import Path

from dnipipe.disk import disk

FORMAT = 1
LIMIT = 250_000  # lines of a file, some 10 MB: four stages' are about what a viewer loads
WITHOUT = "or train without output.trace"
SENT, RECEIVED = ">", "<"


class Trace:
    """Keeps lines in memory until `flush`, and at most LIMIT of them in all: the rest is counted as `dropped`.

    Args:
        stage, stages: k and K.
    """

    def __init__(self, path: Path, stage: int, stages: int) -> None:
        self._path = path
        with disk(f"cannot write {path}", f"name another folder with output.run, {WITHOUT}", start=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb", buffering=0)
        self._spans: list[tuple[str, float, float, int]] = []
        self._messages: list[tuple[str, int, str, int, float]] = []
        self._written = {"spans": 0, "messages": 0}
        self._left, self._refused, self._stand = LIMIT, False, 0
        self.dropped = 0
        self._line({"trace": FORMAT, "stage": stage, "stages": stages, "clock": clock_of_this_machine()})

    def span(self, label: str, begin: float, end: float, batch: int) -> None:
        """What the time from begin to end was spent on, seconds; the batch id, or 0. As Clock.record."""
        if self._room():
            self._spans.append((label, begin, end, batch))

    def message(self, way: str, peer: int, kind: str, batch: int, at: float) -> None:
        """A message was SENT to stage `peer`, or RECEIVED from it, at `at` seconds: within a span of its own."""
        if self._room():
            self._messages.append((way, peer, kind, batch, at))

    def _room(self) -> bool:
        if self._left == 0:
            self.dropped += 1
            return False
        self._left -= 1
        return True

    def flush(self) -> None:
        """Write what is kept. Names need no quoting: they are our labels and types of messages.

        Raises DiskError; what was not written then is kept, for there may be room later.
        """
        lines = [f'["{label}", {_ns(begin)}, {_ns(end)}, {batch}]\n' for label, begin, end, batch in self._spans]
        lines += [f'["{way}", {peer}, "{kind}", {batch}, {_ns(at)}]\n' for way, peer, kind, batch, at in self._messages]
        try:
            self._put("".join(lines))
        finally:
            spans = min(self._stand, len(self._spans))
            messages = self._stand - spans
            self._written["spans"] += spans
            self._written["messages"] += messages
            self._spans, self._messages = self._spans[spans:], self._messages[messages:]

    def close(self) -> None:
        """With the last lines; if the disk has refused some before, they are not what matters now."""
        try:
            if not self._refused:
                self.flush()
                self._line({**self._written, "dropped": self.dropped})
        finally:
            self._file.close()

    def _line(self, value: dict[str, object]) -> None:
        self._put(json.dumps(value) + "\n")

    def _put(self, text: str) -> None:
        """Whole lines only: `_stand` says how many of the text's are in the file."""
        data, begin, done = text.encode(), self._file.tell(), 0
        self._refused = True
        try:
            with disk(f"cannot write {self._path}", f"make room there, {WITHOUT}, and resume the run"):
                while done < len(data):  # a disk that is nearly full takes a part
                    done += self._file.write(data[done:])
            self._refused = False
        finally:
            whole = data.rfind(b"\n", 0, done) + 1
            self._stand = data.count(b"\n", 0, whole)
            if whole < done:
                with suppress(OSError):
                    self._file.truncate(begin + whole)
                    self._file.seek(begin + whole)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def clock_of_this_machine() -> str:
    """Processes with the same answer read the same clock: that of one boot of one machine.

    (Python's perf_counter is CLOCK_MONOTONIC there, which counts from the boot.)
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return platform.node()
