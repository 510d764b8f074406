"""python -m benchmarks.learning: run what is missing, then make tables and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cells import ROOT
from benchmarks.command import add_options, carry_out
from benchmarks.learning.report import LearningStudy
from benchmarks.learning.study import OF_BLEND, OF_HEADS, OF_LESSONS, OF_REMEDIES, QUICK, Axes

RESULTS = ROOT / "benchmarks" / "learning" / "results"
STUDIES = {  # besides the whole grid: the word that asks for it, what it crosses, where it goes
    "quick": (QUICK, ROOT / "runs" / "learning-quick"),
    "blend": (OF_BLEND, RESULTS.with_name("blend")),
    "lessons": (OF_LESSONS, RESULTS.with_name("lessons")),
    "heads": (OF_HEADS, RESULTS.with_name("heads")),
    "remedies": (OF_REMEDIES, RESULTS.with_name("remedies")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    full = Axes()
    kind = parser.add_mutually_exclusive_group()
    for name, told in (
        ("quick", "under five minutes, to see that it works: no comparison"),
        ("blend", "what each of the settings that blend begins with brings"),
        ("lessons", "what each lesson of a synthetic gradient's head brings"),
        ("heads", "what it brings that a head sees or is taught more"),
        ("remedies", "what others do about late gradients"),
    ):
        kind.add_argument(f"--{name}", action="store_const", const=name, dest="study", help=told)
    parser.add_argument("--task", nargs="+", dest="tasks", choices=full.tasks, help="a part of the grid")
    parser.add_argument("--rules", nargs="+", choices=full.rules, metavar="RULE", help=" | ".join(full.rules))
    parser.add_argument("--stages", nargs="+", type=int, choices=full.stages)
    parser.add_argument("--delays", nargs="+", type=int, choices=full.delays)
    parser.add_argument("--seeds", nargs="+", type=int, choices=full.seeds)
    add_options(parser)
    options = parser.parse_args(arguments)
    axes, results = STUDIES.get(options.study, (full, RESULTS))
    named = {name: getattr(options, name) for name in ("tasks", "rules", "stages", "delays", "seeds")}
    parts = {name: tuple(n for n in getattr(axes, name) if n in chosen) for name, chosen in named.items() if chosen}
    if empty := [name for name, part in parts.items() if not part]:
        parser.error(f"--{options.study} has no such {', '.join(empty)}: it runs {axes}")
    study = LearningStudy(axes, replace(axes, **parts), options.study == "quick")
    return carry_out(parser, options, study, results)


if __name__ == "__main__":
    sys.exit(main())
