"""python -m benchmarks.endurance: one long run of a tiny model; what each tenth of it took and held.

A stage of 16 units costs next to nothing, so what is seen is what the pipeline itself does with a batch. Two processes,
over socket files.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import ROOT
from benchmarks.command import VARIABLES
from benchmarks.figures import OVERHEAD, processor
from benchmarks.tables import markdown

RESULTS = ROOT / "benchmarks" / "endurance" / "results"
PARTS = 10
SETTINGS = (
    *("--data.name", "mnist", "--data.batch", "8", "--model.name", "mlp", "--model.layers", "3", "--model.width", "16"),
    *("--pipeline.stages", "2", "--eval.sample", "0", "--output.every", "2", "--output.quiet", "true"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--rule", default="blend", help="default: %(default)s, which keeps the most")
    parser.add_argument(
        "--mnist", default=os.environ.get(VARIABLES["mnist"], ""), metavar="PATH", help="its four files"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the table goes")
    options = parser.parse_args(arguments)
    if not options.mnist:
        parser.error(f"where is the data? pass --mnist, or set {VARIABLES['mnist']}")
    words = (*SETTINGS, "--rule.name", options.rule, "--train.batches", str(options.batches))
    with tempfile.TemporaryDirectory() as folder:
        lines = run(words, options.mnist, Path(folder) / "run")
    text = report(lines, options.batches, shlex.join(("dnipipe", "train", "--data.root", "PATH", *words)))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "README.md").write_text(text)
    print(text, end="")
    return 0


def run(words: Sequence[str], root: str, folder: Path) -> list[list[dict[str, Any]]]:
    """Each stage's lines of metrics. Raises SystemExit if the run fails."""
    command = [sys.executable, "-m", "dnipipe", "train", *words, "--data.root", os.path.abspath(root)]
    command += ["--output.run", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)
    paths = sorted((folder / "metrics").glob("stage-*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def report(stages: Sequence[Sequence[dict[str, Any]]], batches: int, command: str) -> str:
    """A table: for each tenth of the run, what a batch took and what the stage's process held at its end."""
    rows = []
    for part in range(PARTS):
        first, last = part * batches // PARTS, (part + 1) * batches // PARTS
        entries = [f"{first + 1:,} to {last:,}"]
        for lines in stages:
            own = [line for line in lines if first < line["batch"] <= last and line["batches"]]
            entries += [*_entries(own)] if own else ["–"] * 3
        rows.append(entries)
    titles = ("µs a batch", "overhead, % of that", "memory, MiB")
    head = ["batches", *(f"stage {k}: {title}" for k in range(len(stages)) for title in titles)]
    about = (
        f"Measured {time.strftime('%Y-%m-%d')} on {processor()}, load {os.getloadavg()[0]:.1f}. Times are the "
        "processor's, of the stage's own thread, so they grow when others want its caches; overhead as in "
        "docs/files.md.\n"
    )
    return f"# {batches:,} batches of a tiny model\n\n    {command}\n\n{about}\n{markdown(head, rows)}"


def _entries(lines: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    count = sum(line["batches"] for line in lines)
    spent = {name: sum(line[name] for line in lines) for name in lines[0] if name.startswith("processor.")}
    overhead = sum(spent[f"processor.{label}"] for label in OVERHEAD)
    memory = f"{lines[-1]['memory'] / 2**20:.0f}" if "memory" in lines[-1] else "–"
    every = sum(spent.values())
    return f"{1e6 * every / count:.0f}", f"{100 * overhead / every:.1f}", memory


if __name__ == "__main__":
    sys.exit(main())
