"""python -m benchmarks.faults: make every fault on a running pipeline, and say what became of it, a row a fault."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import ROOT
from benchmarks.faults.pipeline import Hung
from benchmarks.faults.report import Results, line, table
from benchmarks.faults.rows import FAULTS, measure, undisturbed

SHORT = 600  # batches of an undisturbed run that is made for its memory alone
RESULTS = ROOT / "benchmarks" / "faults" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = [name for name in FAULTS if not options.only or any(text in name for text in options.only)]
    if not names:
        parser.error(f"--only {' '.join(options.only)}: no fault has such a name; there are {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = Results.load(options.out)
    try:
        _measure(results, names, options)
    except KeyboardInterrupt:
        print("stopped: what was measured is kept", file=sys.stderr)
        return 128 + signal.SIGINT
    text = table(results)
    (options.out / "README.md").write_text(text)
    print(text, end="")
    return 0 if all(results.good(results.rows[name]) for name in names) else 1


def _measure(results: Results, names: Sequence[str], options: argparse.Namespace) -> None:
    if not options.table:
        for name in names:
            row = measure(name, options.stages, options.minutes, options.rate, options.seed)
            results.rows[name] = row
            results.save()
            print(line(row), flush=True)
    batches = max((row.loss[0] for row in results.rows.values() if row.loss), default=0)
    for seed in range(0 if options.table else options.seeds):
        missing = max(results.undisturbed.get(seed, {}), default=0) < batches
        if missing or seed not in results.peaks:
            enough = batches if missing else SHORT
            print(f"undisturbed, seed {seed}, {enough} batches", flush=True)
            try:
                losses, results.peaks[seed] = undisturbed(options.stages, seed, enough)
            except Hung as error:
                raise SystemExit(f"an undisturbed run did not end: {error}") from None
            if missing:
                results.undisturbed[seed] = losses
            results.save()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="of kills; the other faults are made as often as that allows")
    add("--stages", type=int, default=3, metavar="K")
    add("--only", nargs="+", default=[], metavar="TEXT", help="only faults whose name has one of these")
    add("--seeds", type=int, default=5, help="undisturbed runs, for comparison of the loss")
    add("--seed", type=int, default=0, help="decides which stage is hit, and when")
    add("--rate", type=float, default=20.0, help="batches a second at most, while there are faults")
    add("--table", action="store_true", help="make the table of what there is, and measure nothing")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER")
    return parser


if __name__ == "__main__":
    sys.exit(main())
