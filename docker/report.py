"""What each fault of chaos.sh cost, from the stages' ledgers, as Markdown:  python report.py RUN UNDISTURBED

recovered   seconds from the fault's begin until the stage, and all behind it, train again; 0: none stood for a second
rates       batches a second that each stage before it began until then, over its median in the quiet time; or until one
            of them had trained its last, or all that it may alone (service.unguided_batches): then they have to stop
missed      batches begun by stage 0 until then that the stage never had    undone      begun, and lost with its state

Ends with 1 if a rate is below 0.8, the loss more than 3 % above the undisturbed one, or a ledger not in order.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dnipipe.config import load
from dnipipe.service.ledger import NAME, read, unexplained

WITHIN = 0.03  # of the undisturbed loss
LEAST = 0.8  # of its usual rate, at which a stage before a fault goes on
SOON = 2.0  # seconds after a fault, in which what it does may begin


class Run:
    """The ledgers of all stages of one run, and its result."""

    def __init__(self, folder: Path) -> None:
        stages = len(list(folder.glob("stage-*")))
        self.accounts = [read(folder / f"stage-{k}" / NAME) for k in range(stages)]
        self.loss: float = json.loads((folder / "summary.json").read_text())["eval"]["loss"]
        self.unguided = load(folder / "config.toml").service.unguided_batches

    def wrong(self) -> list[str]:
        """What the ledgers should not hold."""
        twice = [f"stage {k}: {what}" for k, one in enumerate(self.accounts) for what in one.violations()]
        gaps = [(k, unexplained(*pair)) for k, pair in enumerate(pairwise(self.accounts))]
        return twice + [f"stages {k} and {k + 1}: {ids} without a reason" for k, ids in gaps if ids]

    def recovered(self, fault: dict[str, Any]) -> float:
        """The end of the longest pause about the fault, of the stage that it hit and of those behind it."""
        hit = self.accounts[fault["stage"] :]
        return max(_pause(account.times, fault["begin"], fault["end"] + SOON) for account in hit)

    def alone_until(self, fault: dict[str, Any]) -> float:
        """Until when the stages before the fault had to go on without what it hit."""
        ends = [self.recovered(fault)]
        for account in self.accounts[: fault["stage"]]:
            begun = zip(account.begun, account.times, strict=True)
            alone = [at for batch, at in begun if at >= fault["begin"] and batch in account.alone]
            bound = [fault["begin"], *alone][self.unguided : self.unguided + 1]
            ends += [account.times[-1], *bound]
        return min(ends)

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


@dataclass(frozen=True)
class Cost:
    """Of one fault. `rates`: of the stages before it, over their usual ones; none where nothing stood."""

    fault: dict[str, Any]
    recovered: float
    rates: list[float]
    missed: list[int]
    undone: list[int]

    def row(self) -> list[str]:
        rates = [f"{rate:.2f}" for rate in self.rates]
        lists = (" ".join(map(str, each)) or "-" for each in (rates, self.missed, self.undone))
        return [self.fault["fault"], str(self.fault["stage"]), f"{self.recovered:.1f}", *lists]

    def slow(self) -> list[str]:
        what = f"after {self.fault['fault']} {self.fault['stage']}"
        return [f"stage {k} at {rate:.2f} {what}" for k, rate in enumerate(self.rates) if rate < LEAST]


def costs(run: Run, faults: list[dict[str, Any]]) -> Iterator[Cost]:
    ends = [(fault["begin"], max(run.recovered(fault), fault["end"])) for fault in faults]
    stages = range(len(run.accounts))
    usual = [normal(run, stage, ends) for stage in stages]
    for fault, (begin, end) in zip(faults, ends, strict=True):
        until = run.alone_until(fault)
        before = stages[: fault["stage"]] if until > begin else ()
        yield Cost(
            fault,
            run.recovered(fault) - begin,
            [run.rate(stage, begin, until) / usual[stage] for stage in before],
            [run.missed(stage, begin, end) for stage in stages],
            [run.undone(stage, begin, end) for stage in stages],
        )


def normal(run: Run, stage: int, outages: list[tuple[float, float]]) -> float:
    """Median batches a second of a stage, over the stretches of two seconds that no outage touches."""
    times = run.accounts[stage].times
    first, last = run.accounts[-1].times[0], run.accounts[0].times[-1]
    stretches = [first + 2 * n for n in range(int((last - first) / 2))]
    quiet = [at for at in stretches if not any(begin < at + 2 and at < end for begin, end in outages)]
    return statistics.median([run.rate(stage, at, at + 2) for at in quiet] or [len(times) / (times[-1] - times[0])])


def table(rows: list[list[str]]) -> Iterator[str]:
    """Markdown, in columns for who reads it in a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        yield "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"


def main(folder: Path, other: Path) -> int:
    run, undisturbed = Run(folder), Run(other)
    faults = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    found = list(costs(run, faults))
    day = time.strftime("%Y-%m-%d", time.gmtime(faults[0]["begin"]))
    print(f"`docker/chaos.sh`, {day}: {len(faults)} faults in {run.accounts[0].last} batches\n")
    title = ["fault", "stage", "recovered, s", "rates before it, by stage", "missed, by stage", "undone, by stage"]
    print(*table([title, *(cost.row() for cost in found)]), sep="\n")
    apart = run.loss / undisturbed.loss - 1
    print(f"\n- validation loss {run.loss:.4f}, undisturbed {undisturbed.loss:.4f} ({apart:+.1%})")
    slow = [each for cost in found for each in cost.slow()]
    print("- the stages before a fault: " + ("; ".join(slow) or f"each at {LEAST} of its usual rate at least"))
    wrong = run.wrong()
    print("- ledgers: " + ("; ".join(wrong) or "each batch at most once, every gap explained"))
    return 0 if apart <= WITHIN and not slow and not wrong else 1  # a loss that is none is not within


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
