"""python -m benchmarks.fuzz: send a stage's transport garbage, and count what it makes of it."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.fuzz.connections import connections
from benchmarks.fuzz.frames import frames

GROWTH = 50  # MB of memory that may be more at the end than after the first part


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    add = parser.add_argument
    add("--frames", type=int, default=20_000, help="messages, most of them none (default: %(default)s)")
    add("--connections", type=int, default=2_000, help="that do not speak ZeroMQ (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what is sent")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # what is dropped is counted here
    counted = [
        _counted("frames", options.frames, frames(options.frames, options.seed)),
        _counted("connections", options.connections, connections(options.connections, options.seed)),
    ]
    return 0 if all(growth < GROWTH for growth in counted) else 1


def _counted(what: str, count: int, parts: Iterator[Counter[str]]) -> float:
    """Print what came of all parts. Returns the growth of memory in MB, from the end of the first part on."""
    began, found, first = time.monotonic(), Counter[str](), None
    for part in parts:
        found += part
        first = first or _memory()
    growth = _memory() - (first or 0.0)
    print(f"{count:,} {what}, {time.monotonic() - began:.0f} s, no crash, memory grew by {growth:.1f} MB")
    for reason, number in found.most_common():
        print(f"  {number:>9,}  {reason}")
    return growth


def _memory() -> float:
    """MB that this process has in the main memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
