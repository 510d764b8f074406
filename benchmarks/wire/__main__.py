"""python -m benchmarks.wire: what fewer bytes on the wire cost; runs what is missing, then makes tables and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.cells import ROOT
from benchmarks.command import add_options, carry_out
from benchmarks.wire.report import WireStudy
from benchmarks.wire.study import TASKS

RESULTS = ROOT / "benchmarks" / "wire" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__)
    parser.add_argument("--task", nargs="+", dest="tasks", choices=TASKS, default=tuple(TASKS), help="some of them")
    add_options(parser)
    options = parser.parse_args(arguments)
    return carry_out(parser, options, WireStudy(tuple(options.tasks)), RESULTS)


if __name__ == "__main__":
    sys.exit(main())
