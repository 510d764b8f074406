"""python -m benchmarks.learning: run what is missing, then make tables and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cells import ROOT
from benchmarks.command import add_options, carry_out
from benchmarks.learning.report import LearningStudy
from benchmarks.learning.study import OF_BLEND, QUICK, Axes

RESULTS = ROOT / "benchmarks" / "learning" / "results"
OF_BLEND_RESULTS = RESULTS.with_name("blend")
QUICK_RESULTS = ROOT / "runs" / "learning-quick"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    full = Axes()
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="under five minutes, to see that it works: no comparison")
    kind.add_argument("--blend", action="store_true", help="what each of the settings that blend begins with brings")
    parser.add_argument("--task", nargs="+", dest="tasks", choices=full.tasks, help="a part of the grid")
    parser.add_argument("--rules", nargs="+", choices=full.rules, metavar="RULE", help=" | ".join(full.rules))
    parser.add_argument("--stages", nargs="+", type=int, choices=full.stages)
    parser.add_argument("--delays", nargs="+", type=int, choices=full.delays)
    parser.add_argument("--seeds", nargs="+", type=int, choices=full.seeds)
    add_options(parser)
    options = parser.parse_args(arguments)
    axes, results = (
        (QUICK, QUICK_RESULTS) if options.quick else (OF_BLEND, OF_BLEND_RESULTS) if options.blend else (full, RESULTS)
    )
    named = {name: getattr(options, name) for name in ("tasks", "rules", "stages", "delays", "seeds")}
    parts = {name: tuple(n for n in getattr(axes, name) if n in chosen) for name, chosen in named.items() if chosen}
    if empty := [name for name, part in parts.items() if not part]:
        parser.error(f"--{'blend' if options.blend else 'quick'} has no such {', '.join(empty)}: it runs {axes}")
    study = LearningStudy(axes, replace(axes, **parts), options.quick)
    return carry_out(parser, options, study, results)


if __name__ == "__main__":
    sys.exit(main())
