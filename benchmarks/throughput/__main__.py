"""python -m benchmarks.throughput: measure what is missing, side by side, then make tables and plots."""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import ROOT
from benchmarks.emulator import Link
from benchmarks.plots import draw
from benchmarks.throughput.places import RunFailed, place
from benchmarks.throughput.report import plots, tables
from benchmarks.throughput.study import MAIN, SYSTEMS, Condition, Record, Study, load
from benchmarks.throughput.workload import FEATURES

DELAYS = [0.0, 1.0, 10.0, 50.0, 100.0]  # ms
RESULTS = ROOT / "benchmarks" / "throughput" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick:
        options.systems, options.repeats, options.seconds = ["1f1b", "local"], 1, 3.0
        options.stages, options.microbatches = [2], [8]
        options.delays = [0.0, 50.0] if options.links == "emulated" else None
    if options.links != "emulated":
        if options.delays or any(options.rates) or options.jitter:
            parser.error(
                f"--links {options.links}: its links are as they are; --delays, --rates and --jitter need emulated ones"
            )
        options.delays = [0.0]
    options.delays = options.delays or DELAYS
    if options.features != FEATURES and not options.compute:
        parser.error(f"--features {options.features}: real stages have their own; add --compute sleep=20ms")
    study = Study(
        tuple(_conditions(options)),
        tuple(options.systems),
        tuple(options.microbatches),
        options.repeats,
        options.seconds,
        options.links,
    )
    own = f"quick-{options.links}" if options.quick else options.links
    folder = options.out or (RESULTS if own == "emulated" else ROOT / "runs" / f"throughput-{own}")
    records = load(folder / "records.jsonl")
    others = {record.links for record in records} - {study.links}
    if others and not options.table:
        parser.error(
            f"--links {study.links}: {folder} holds what was measured over links {', '.join(sorted(others))}, and "
            "would take it for this; name another folder, --out FOLDER"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not options.table:
        _measure(study, max(options.stages), folder, records)
    _write(records, folder)
    return 0


def _measure(study: Study, hosts: int, folder: Path, records: list[Record]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with place(study.links, hosts) as where, (folder / "records.jsonl").open("a") as file:

        def keep(record: Record) -> None:
            if where.reports:
                file.write(record.to_json() + "\n")
                file.flush()
                kind = "search" if record.repeat < 0 else f"repeat {record.repeat}"
                tried = f", M = {record.microbatches}" if record.microbatches > 1 else ""
                print(f"{record.condition}: {record.system}{tried}, {kind}: {record.rate:.1f} samples/s", flush=True)

        try:
            study.carry_out(where, records, keep)
        except RunFailed as error:
            raise SystemExit(f"a run failed: {error}") from None
        except KeyboardInterrupt:
            raise SystemExit("stopped: what was measured is kept; the same command goes on") from None


def _write(records: Sequence[Record], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = tables(records)
    pictures = "".join(f"\n![{name}]({name})\n" for name in draw(plots(records), folder))
    (folder / "README.md").write_text(text + pictures)
    print(text, end="")


def _conditions(options: argparse.Namespace) -> list[Condition]:
    slow = tuple((int(stage), float(factor)) for stage, _, factor in (word.partition(":") for word in options.slow))
    return [
        Condition(
            stages, Link(delay / 1000, options.jitter / 1000, rate * 1e6), options.compute, slow, options.features
        )
        for stages, rate, delay in itertools.product(options.stages, options.rates, options.delays)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    add = parser.add_argument
    add("--links", choices=("none", "emulated", "hosts"), default="none", help="where ranks run (default: %(default)s)")
    add("--stages", nargs="+", type=int, default=[2], metavar="K")
    add("--delays", nargs="+", type=float, metavar="MS", help="one way; emulated links only (default: 0 1 10 50 100)")
    add("--rates", nargs="+", type=float, default=[0], metavar="MBIT", help="of each host's line; 0: no limit")
    add("--jitter", type=float, default=0.0, metavar="MS")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(MAIN))
    add("--microbatches", nargs="+", type=int, default=[4, 8, 16, 32], metavar="M", help="tried for each schedule")
    add("--compute", type=_sleep, default=0.0, metavar="sleep=20ms", help="stages that sleep instead of computing")
    add("--slow", nargs="+", default=[], metavar="STAGE:FACTOR", help="with --compute: this stage takes longer")
    add("--features", type=int, default=FEATURES, metavar="D", help="with --compute: of a sample between two stages")
    add("--repeats", type=int, default=3)
    add("--seconds", type=float, default=6.0, help="of each measurement")
    add("--quick", action="store_true", help="a minute, to see that it works: two systems, two delays, once")
    add("--table", action="store_true", help="make tables and plots of what there is and measure nothing")
    add("--out", type=Path, metavar="FOLDER", help="records, tables and plots")
    return parser


def _sleep(text: str) -> float:
    word, _, value = text.partition("=")
    if word != "sleep" or not value.endswith("ms"):
        raise argparse.ArgumentTypeError(f"{text}: expected sleep=20ms")
    return float(value.removesuffix("ms")) / 1000


if __name__ == "__main__":
    sys.exit(main())
