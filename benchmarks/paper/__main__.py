"""python -m benchmarks.paper fcn | cnn | updates | unlocked | deep | all: one table of the paper, or all of them.

length, length-6 and length-21, not among them: how far the short protocol's figures come with more iterations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.cells import ROOT
from benchmarks.command import add_options, carry_out
from benchmarks.paper.report import PaperStudy
from benchmarks.paper.study import LONGER, PROTOCOLS, TABLES, UNITS

RESULTS = ROOT / "benchmarks" / "paper" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("name", choices=(*TABLES, *LONGER, "all"), help="which table")
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="short", help="the paper's, or one of minutes (default)"
    )
    parser.add_argument("--data", choices=UNITS, default="mnist")
    add_options(parser)
    options = parser.parse_args(arguments)
    names = TABLES if options.name == "all" else (options.name,)
    study = PaperStudy(names, options.protocol, options.data)
    return carry_out(parser, options, study, RESULTS / f"{options.data}-{options.protocol}")


if __name__ == "__main__":
    sys.exit(main())
