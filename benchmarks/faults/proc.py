"""What the kernel says of processes: /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROC = Path("/proc")


def parent(pid: int) -> int:
    """0 if there is no such process, or it has ended."""
    with contextlib.suppress(OSError):
        state, above = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[:2]
        return 0 if state in b"ZX" else int(above)
    return 0


def child(above: int) -> int:
    """A process that this one has started; 0 if it has none."""
    return next((pid for pid in _all() if parent(pid) == above), 0)


def naming(text: str) -> list[int]:
    """Processes that have this in their command."""
    found = []
    for pid in _all():
        with contextlib.suppress(OSError):
            if text.encode() in (PROC / str(pid) / "cmdline").read_bytes() and pid != os.getpid():
                found.append(pid)
    return found


def peak(pid: int) -> int:
    """Bytes of memory that a process has had at most."""
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _all() -> list[int]:
    return [int(entry.name) for entry in PROC.glob("[0-9]*")]


__all__ = ["child", "naming", "parent", "peak"]
