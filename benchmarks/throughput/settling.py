"""python -m benchmarks.throughput.settling: how soon the window's automatic size hides the link's delay.

Stages that sleep, so that nothing but the link and the window decides. The limit is what the same run does with a
window that is large from the beginning, in its last half.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.emulator import Link
from benchmarks.tables import markdown
from benchmarks.throughput.places import Place, place
from benchmarks.throughput.rank import Order
from dnipipe.tracing import read

PARTS = ((0, 20), (20, 40), (40, 60), (60, 100), (100, 199))  # batches of a run whose pace is shown
BATCHES = 200
LARGE = 200  # batches of a window that is no limit


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput.settling", description=__doc__)
    add = parser.add_argument
    add("--links", choices=("none", "emulated"), default="emulated")
    add("--delay", type=float, default=100.0, metavar="MS", help="one way")
    add("--compute", nargs="+", type=float, default=[50, 20, 10], metavar="MS", help="of a batch in each stage")
    add("--stages", type=int, default=2, metavar="K")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no rank stays behind
    rows = []
    with place(options.links, options.stages) as where:
        for step in options.compute:
            ends = []
            for window in ("auto", str(LARGE)):
                order = Order("traced", options.stages, step / 1000, words=_words(window), batches=BATCHES)
                ends.append(_begun(where, order, options.delay / 1000))
            limit = pace(ends[1], BATCHES // 2, BATCHES - 1)
            shares = [f"{limit / pace(ends[0], *part):.2f}" for part in PARTS]
            rows.append([f"{step:g} ms", f"{1000 * limit:.1f} ms", *shares])
            print(" | ".join(rows[-1]), flush=True)
    head = ["sleep of a batch in a stage", "a batch takes, at the limit", *(f"batches {a} to {b}" for a, b in PARTS)]
    print("\n" + markdown(head, rows), end="")
    return 0


def _words(window: str) -> tuple[str, ...]:
    return ("--rule.name", "local", "--output.trace", "true", "--pipeline.window", window)


def _begun(where: Place, order: Order, delay: float) -> list[float]:
    """When stage 0 sent each batch on, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        where.run([replace(order, folder=str(run))] * order.stages, Link(delay=delay))
        said = read(run)[0].messages
    return [each.at for each in said if each.kind == "Activation"]


def pace(times: Sequence[float], first: int, last: int) -> float:
    """Seconds a batch, between these two."""
    return (times[last] - times[first]) / (last - first)


if __name__ == "__main__":
    sys.exit(main())
