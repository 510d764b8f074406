"""python -m benchmarks.time_to_loss: probe, search and race what is missing, then make tables, plots and the map."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import ROOT, Records
from benchmarks.command import VARIABLES, check_data
from benchmarks.grid import cores
from benchmarks.plots import draw
from benchmarks.throughput.places import RunFailed, here
from benchmarks.time_to_loss.contest import Contest
from benchmarks.time_to_loss.race import Course, Runs
from benchmarks.time_to_loss.report import plots, rows, tables
from benchmarks.time_to_loss.study import DECOUPLED, STAGES, SYNC, SYSTEMS, TASKS, Task

DELAYS = [0.0, 10.0, 50.0]  # ms
RESULTS = ROOT / "benchmarks" / "time_to_loss" / "results"
HEAD = (
    "Wall-clock seconds of training, evaluations left out, to a validation loss; medians of the seeds. Each system has "
    "the setting with the fewest expected seconds at each link: samples to the target by a search in the laboratory "
    "(one process, gradients as late as the link makes them), times the pace of a short run over the link. "
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    tasks = {name: task.quick() if options.quick else task for name, task in TASKS.items()}
    wanted = {name: tasks[name] for name in options.tasks}
    if options.links != "emulated":
        if options.delays:
            parser.error(f"--links {options.links}: its link is as it is; --delays need emulated ones")
        options.delays = [0.0]
    folder = options.out or _folder(options)
    runs, records = Runs(folder / "runs.jsonl"), Records(folder / "search")
    complete = True
    if not options.table:
        roots = {name: getattr(options, name) for name in ("mnist", "text")}
        check_data(parser, {task.data for task in wanted.values()}, roots)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        complete = _carry_out(options, wanted, roots, runs, records)
    _write(tasks, runs, records, folder)
    return 0 if complete else 1


def _carry_out(
    options: argparse.Namespace, tasks: dict[str, Task], roots: dict[str, str], runs: Runs, records: Records
) -> bool:
    delays = tuple(ms / 1000 for ms in options.delays or ([0.0, 50.0] if options.quick else DELAYS))
    systems = (SYNC, *(name for name in options.systems if name != SYNC))
    try:
        with here(options.links, STAGES) as where:
            return all(
                Contest(name, task, systems, delays, tuple(options.seeds)).carry_out(
                    Course(where, options.links, os.path.abspath(roots[task.data])), runs, records, options.jobs
                )
                for name, task in tasks.items()
            )
    except RunFailed as error:
        raise SystemExit(f"a run failed: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: what was finished is kept; the same command goes on") from None


def _folder(options: argparse.Namespace) -> Path:
    own = "quick" if options.quick else options.links
    return RESULTS if own == "emulated" else ROOT / "runs" / f"time-to-loss-{own}"


def _write(tasks: dict[str, Task], runs: Runs, records: Records, folder: Path) -> None:
    """README.md, the plots and map.json in the folder; the tables on the screen too."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Time to loss", _origin(runs) + HEAD]
    parts += [tables(name, task, runs, records) for name, task in tasks.items()]
    text = "\n\n".join(part.rstrip() for part in parts) + "\n"
    names = draw([plot for name, task in tasks.items() for plot in plots(name, task, runs, records)], folder)
    (folder / "README.md").write_text(text + "".join(f"\n![{name}]({name})\n" for name in names))
    found = [row.to_dict() for name, task in tasks.items() for row in rows(name, task, runs, records)]
    (folder / "map.json").write_text(json.dumps(found, indent=1) + "\n")
    print(text, end="")


def _origin(runs: Runs) -> str:
    if not runs.all:
        return "Nothing has been run yet. "
    days = sorted({run.session.split()[0] for run in runs.all})
    named = [", ".join(sorted({getattr(run, name) for run in runs.all})) for name in ("processor", "torch", "links")]
    return f"Measured {', '.join(days)} on {named[0]}, a stage a core; torch {named[1]}; links: {named[2]}. "


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_loss", description=__doc__)
    add = parser.add_argument
    add("--links", choices=("none", "emulated"), default="none", help="as in benchmarks.throughput (default: none)")
    add("--delays", nargs="+", type=float, metavar="MS", help="one way; emulated links only (default: 0 10 50)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--systems", nargs="+", choices=SYSTEMS, default=list(DECOUPLED), help=f"{SYNC} is always one of them")
    add("--seeds", nargs="+", type=int, default=[0], help="of the races (default: 0)")
    add("--jobs", type=int, default=len(cores()), help="searches at once (default: a core each, %(default)s)")
    add("--mnist", default=os.environ.get(VARIABLES["mnist"], ""), metavar="PATH", help="its four files")
    add("--text", default=os.environ.get(VARIABLES["text"], ""), metavar="FILE", help="TinyShakespeare")
    add("--quick", action="store_true", help="under three minutes, to see that it works: no comparison")
    add("--table", action="store_true", help="make tables and plots of what there is and run nothing")
    add("--out", type=Path, metavar="FOLDER", help="records, tables and plots")
    return parser


if __name__ == "__main__":
    sys.exit(main())
