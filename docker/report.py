"""What each fault of chaos.sh cost, from the stages' ledgers:  python report.py RUN UNDISTURBED

recovered   seconds from the fault's begin until the stage, and all behind it, train again; 0: none stood for a second
rate        batches a second that the stage before the fault began until then, over its median in the quiet time
missed      batches begun by stage 0 until then that the stage never had    undone      begun, and lost with its state
"""

from __future__ import annotations

import json
import statistics
import sys
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from dnipipe.service.ledger import NAME, read, unexplained

WITHIN = 0.03  # of the undisturbed loss
SOON = 2.0  # seconds after a fault, in which what it does may begin


class Run:
    """The ledgers of all stages of one run, and its result."""

    def __init__(self, folder: Path) -> None:
        stages = len(list(folder.glob("stage-*")))
        self.accounts = [read(folder / f"stage-{k}" / NAME) for k in range(stages)]
        self.loss: float = json.loads((folder / "summary.json").read_text())["eval"]["loss"]

    def wrong(self) -> list[str]:
        """What the ledgers should not hold."""
        twice = [f"stage {k}: {what}" for k, one in enumerate(self.accounts) for what in one.violations()]
        gaps = [(k, unexplained(*pair)) for k, pair in enumerate(pairwise(self.accounts))]
        return twice + [f"stages {k} and {k + 1}: {ids} without a reason" for k, ids in gaps if ids]

    def recovered(self, fault: dict[str, Any]) -> float:
        """The end of the longest pause about the fault, of the stage that it hit and of those behind it."""
        hit = self.accounts[fault["stage"] :]
        return max(_pause(account.times, fault["begin"], fault["end"] + SOON) for account in hit)

    def rate(self, stage: int, begin: float, end: float) -> float:
        times = self.accounts[stage].times
        return (bisect_left(times, end) - bisect_left(times, begin)) / max(end - begin, 1e-9)

    def missed(self, stage: int, begin: float, end: float) -> int:
        first = self.accounts[0]
        ids = first.begun[bisect_left(first.times, begin) : bisect_left(first.times, end)]
        return len(set(ids) - set(self.accounts[stage].begun))

    def undone(self, stage: int, begin: float, end: float) -> int:
        account = self.accounts[stage]
        starts = [start for start in account.starts if begin <= start["time"] <= end]
        return sum(len([b for b in account.begun if s["from"] < b <= s["before"]]) for s in starts)


def _pause(times: list[float], begin: float, end: float) -> float:
    """When the longest time without a batch that touches these two ended; `begin` if it was not even a second."""
    longest, ended = max(((b - a, b) for a, b in pairwise(times) if a < end and b > begin), default=(0.0, begin))
    return ended if longest > 1 else begin


def rows(run: Run, faults: list[dict[str, Any]]) -> Iterator[list[str]]:
    ends = [(fault["begin"], max(run.recovered(fault), fault["end"])) for fault in faults]
    stages = range(len(run.accounts))
    for fault, (begin, end) in zip(faults, ends, strict=True):
        before, whole = fault["stage"] - 1, run.recovered(fault)
        rate = (
            f"{run.rate(before, begin, whole) / normal(run, before, ends):.2f}"
            if before >= 0 and whole > begin
            else "-"
        )
        missed = " ".join(str(run.missed(stage, begin, end)) for stage in stages)
        undone = " ".join(str(run.undone(stage, begin, end)) for stage in stages)
        yield [fault["fault"], str(fault["stage"]), f"{whole - begin:.1f}", rate, missed, undone]


def normal(run: Run, stage: int, outages: list[tuple[float, float]]) -> float:
    """Median batches a second of a stage, over the stretches of two seconds that no outage touches."""
    times = run.accounts[stage].times
    first, last = run.accounts[-1].times[0], run.accounts[0].times[-1]
    stretches = [first + 2 * n for n in range(int((last - first) / 2))]
    quiet = [at for at in stretches if not any(begin < at + 2 and at < end for begin, end in outages)]
    return statistics.median([run.rate(stage, at, at + 2) for at in quiet] or [len(times) / (times[-1] - times[0])])


def main(folder: Path, other: Path) -> int:
    run, undisturbed = Run(folder), Run(other)
    faults = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    title = ["fault", "stage", "recovered, s", "rate before it", "missed, by stage", "undone, by stage"]
    table = [title, *rows(run, faults)]
    widths = [max(len(row[column]) for row in table) for column in range(len(title))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))
    apart = run.loss / undisturbed.loss - 1
    print(f"{len(faults)} faults; validation loss {run.loss:.4f}, undisturbed {undisturbed.loss:.4f} ({apart:+.1%})")
    wrong = run.wrong()
    print("ledgers: " + ("each batch at most once, every gap explained" if not wrong else "; ".join(wrong)))
    return 1 if wrong or apart > WITHIN else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
