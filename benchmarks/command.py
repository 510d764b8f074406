"""What the command lines of all studies share: `python -m benchmarks.STUDY`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Protocol

from benchmarks.cells import Cell, Records
from benchmarks.grid import Grid, cores, distinct
from benchmarks.plots import Plot, draw
from benchmarks.tables import NOTE, origin

VARIABLES = {"mnist": "DNIPIPE_MNIST", "cifar10": "DNIPIPE_CIFAR10", "text": "DNIPIPE_TEXT"}  # data.name -> its path


class Study(Protocol):
    """A grid and what is made of it."""

    @property
    def title(self) -> str: ...

    @property
    def shown(self) -> Sequence[str]:
        """Names of the tables that were asked for."""

    def cells(self, records: Records) -> list[Cell]:
        """What is to be run, as it is known with these records."""

    def tables(self, records: Records) -> dict[str, str]:
        """Name -> heading and table in Markdown; all of the study's, whatever was asked for."""

    def plots(self, records: Records) -> list[Plot]:
        """All of the study's."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="records, tables and plots (default: the study's)")
    parser.add_argument(
        "--jobs", type=int, default=len(cores()), help="runs at once (default: a core each, %(default)s)"
    )
    parser.add_argument(
        "--mnist", default=os.environ.get(VARIABLES["mnist"], ""), metavar="PATH", help="its four files"
    )
    parser.add_argument(
        "--cifar10", default=os.environ.get(VARIABLES["cifar10"], ""), metavar="PATH", help="its six files"
    )
    parser.add_argument("--text", default=os.environ.get(VARIABLES["text"], ""), metavar="FILE", help="TinyShakespeare")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only cells whose name has one of these")
    parser.add_argument("--list", action="store_true", help="print the commands of the cells and run nothing")
    parser.add_argument("--table", action="store_true", help="make tables and plots of what there is and run nothing")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders, checkpoints and all")


def carry_out(parser: argparse.ArgumentParser, options: argparse.Namespace, study: Study, out: Path) -> int:
    """What the options ask of this study. `out` is its own folder. Returns the exit status."""
    records = Records(options.out or out)
    plan = _chosen(study, options.only)
    roots = {name: getattr(options, name) for name in VARIABLES}
    if options.list:
        for cell in distinct(plan(records)):
            waits = "waits for others, which decide its last setting"
            mark = "done" if records.of(cell) else waits if cell.waits else "to run"
            print(f"# {cell}: {mark}\n{shlex.join(cell.command(roots.get(cell.loaded.data.name, '')))}")
        return 0
    complete = True
    if not options.table:
        check_data(parser, {cell.loaded.data.name for cell in plan(records)}, roots)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        grid = Grid(plan, records, {name: os.path.abspath(root) for name, root in roots.items() if root}, options.jobs)
        grid.keep = options.keep
        try:
            complete = grid.run()
        except KeyboardInterrupt:
            print(f"stopped: what was finished is in {records.folder}; the same command goes on", file=sys.stderr)
            return 128 + signal.SIGINT
        waiting = sum(cell.waits for cell in plan(records))
        if waiting:
            print(f"{waiting} cells wait for others that have no result", file=sys.stderr)
    _write(study, records)
    return 0 if complete else 1


def _chosen(study: Study, only: Sequence[str]) -> Callable[[Records], list[Cell]]:
    return lambda records: [c for c in study.cells(records) if not only or any(text in str(c) for text in only)]


def check_data(parser: argparse.ArgumentParser, needed: Set[str], roots: Mapping[str, str]) -> None:
    """Before anything is run: is the data there that is needed? A data.name without a path needs none."""
    for name in sorted(needed & VARIABLES.keys()):
        if not roots[name]:
            parser.error(f"where is the data? pass --{name}, or set {VARIABLES[name]}")
        if not os.path.exists(roots[name]):
            parser.error(f"--{name} {roots[name]}: there is no such {'file' if name == 'text' else 'folder'}")


def _write(study: Study, records: Records) -> None:
    """README.md in the records' folder, with all tables and plots; those that were asked for on the screen too."""
    records.folder.mkdir(parents=True, exist_ok=True)
    tables = study.tables(records)
    pictures = [f"![{name}]({name})" for name in draw(study.plots(records), records.folder)]
    head = [f"# {study.title}", origin(records) + NOTE]
    (records.folder / "README.md").write_text(_joined([*head, *tables.values(), *pictures]))
    print(_joined([*head, *(tables[name] for name in study.shown)]), end="")


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part.rstrip() for part in parts) + "\n"
