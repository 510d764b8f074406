"""The loss with the faults in it, and what the stages did meanwhile:  python picture.py RUN UNDISTURBED picture.png

Reads what report.py reads, and the metrics of the last stage. Needs matplotlib (dnipipe's extra `plots`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window
from matplotlib import pyplot
from matplotlib.axes import Axes
from report import Run

STEP = 2.0  # seconds that a rate is the mean of


def losses(folder: Path, last: int) -> tuple[list[float], list[float]]:
    """Seconds since the first line, and the training loss, of the last stage's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics" / f"stage-{last}.jsonl").read_text().splitlines()]
    known = [(line["time"], line["loss"]) for line in lines if "loss" in line]
    return [time - known[0][0] for time, _ in known], [loss for _, loss in known]


def rates(axis: Axes, run: Run, begin: float) -> None:
    end = run.accounts[0].times[-1]
    steps = [begin + STEP * number for number in range(int((end - begin) / STEP))]
    for stage in range(len(run.accounts)):
        y = [run.rate(stage, step, step + STEP) for step in steps]
        axis.plot([step - begin for step in steps], y, label=f"stage {stage}", linewidth=1)


def main(folder: Path, other: Path, picture: Path) -> None:
    run, faults = Run(folder), [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    last, begin = len(run.accounts) - 1, run.accounts[-1].times[0]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    top.plot(*losses(other, last), label="undisturbed", color="0.6", linewidth=1)
    top.plot(*losses(folder, last), label="with the faults", linewidth=1)
    top.set(ylabel="training loss")
    rates(bottom, run, begin)
    bottom.set(xlabel="seconds", ylabel="batches a second")
    for axis in (top, bottom):
        for fault in faults:
            mark(axis, fault, begin, run)
        axis.legend(loc="upper right", fontsize="small")
    for fault in faults:
        where = (fault["begin"] - begin, 1.0)
        name = f"{fault['fault']} {fault['stage']}"
        top.annotate(name, where, xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", fontsize=8)
    figure.savefig(picture, dpi=100)


def mark(axis: Axes, fault: dict[str, Any], begin: float, run: Run) -> None:
    """From the fault until the stage and all behind it train again."""
    axis.axvspan(fault["begin"] - begin, run.recovered(fault) - begin, color="tab:red", alpha=0.15)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
