"""python -m benchmarks.throughput.timeline: what each stage does at each moment, dnipipe above 1F1B on one link."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.emulator import Link
from benchmarks.throughput.places import place
from benchmarks.throughput.rank import Order
from benchmarks.throughput.study import RULES, SIZE
from dnipipe.tracing import Row, cut, draw, merged, read

MICROBATCHES = 16  # in a step of 1F1B
SYNC = ("--rule.name", "sync", "--data.batch", str(SIZE * MICROBATCHES), "--sync.microbatches", str(MICROBATCHES))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput.timeline", description=__doc__)
    parser.add_argument("--links", choices=("none", "emulated"), default="emulated")
    parser.add_argument("--stages", type=int, default=2, metavar="K")
    parser.add_argument("--delay", type=float, default=50.0, metavar="MS", help="one way")
    parser.add_argument("--rule", choices=tuple(RULES), default="local")
    parser.add_argument("--seconds", type=float, default=3.0, help="that the picture shows")
    parser.add_argument("png", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no rank stays behind
    runs = {  # title -> its settings, how many batches, and the one with which the picture begins
        f"dnipipe, rule.name = {options.rule}": (RULES[options.rule], 120, 60),
        f"1F1B, {MICROBATCHES} micro-batches a step": (SYNC, 5, 2),
    }
    panels: dict[str, list[Row]] = {}
    with place(options.links, options.stages) as where:
        for title, (words, batches, first) in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                run = f"{folder}/run"
                order = Order(
                    "traced", options.stages, words=(*words, "--output.trace", "true"), batches=batches, folder=run
                )
                where.run([order] * options.stages, Link(delay=options.delay / 1000))
                panels[f"{title}, {options.delay:g} ms each way"] = _rows(Path(run), first, options.seconds)
    draw(panels, options.png)
    for title, rows in panels.items():
        print("\n".join([title, *_shares(rows)]))
    print(options.png)
    return 0


def _rows(run: Path, first: int, seconds: float) -> list[Row]:
    """From the beginning of batch `first` on."""
    timeline = cut(merged(read(run)), str(first), None)
    return cut(timeline, None, f"{timeline.begin + seconds}s").rows()


def _shares(rows: Sequence[Row]) -> Iterator[str]:
    """A line a stage: what its time was spent on, in per cent."""
    for stage in sorted({row[0] for row in rows}):
        spent: dict[str, float] = defaultdict(float)
        for _, name, begin, end in (row for row in rows if row[0] == stage):
            spent[name] += end - begin
        most = sorted(spent.items(), key=lambda item: -item[1])
        parts = (f"{name} {100 * seconds / sum(spent.values()):.1f}" for name, seconds in most)
        yield f"  stage {stage}, %: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
