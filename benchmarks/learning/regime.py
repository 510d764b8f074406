"""python -m benchmarks.learning.regime: where mending a prediction pays, by batch size, learning rate and delay.

for each batch size and rate      backprop │ local │ blend-0 and blend at each delay     the same batches, in one order
                                  what each ends at, and how far above backprop
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.cells import ROOT, Cell, Record, Records
from benchmarks.command import add_options, carry_out
from benchmarks.learning.study import RULES, STAGES, TASKS, words_of
from benchmarks.plots import Line, Plot
from benchmarks.tables import average, entry, markdown

BATCHES, RATES, DELAYS, SEEDS = (4, 16, 64), ("1e-3", "4e-3"), (0, 2, 8), (0, 1, 2)
COMPARED = ("sync", "local", "blend-0", "blend")  # blend-0: as it was before it looked ahead, and mended by halves
UPDATES = ("--train.batches", "800", "--eval.every", "0")  # as many for each, whatever their size
FOLDER = ROOT / "benchmarks" / "learning" / "regimes"


@dataclass(frozen=True)
class RegimeStudy:
    """Args: seeds, of what is run; the table shows all that there are."""

    seeds: tuple[int, ...] = SEEDS
    title = "Where mending a prediction pays"
    shown = ("regime",)

    def cells(self, records: Records) -> list[Cell]:
        return [
            self.cell(batch, rate, rule, delay, seed)
            for seed, batch, rate in product(self.seeds, BATCHES, RATES)
            for rule, delay in columns()
        ]

    def cell(self, batch: int, rate: str, rule: str, delay: int, seed: int) -> Cell:
        labels = {"batch": batch, "rate": rate, "rule": rule, "delay": delay, "seed": seed}
        words = ("--data.batch", str(batch), "--optimizer.lr", rate, *words_of("first", rule, STAGES, delay, seed))
        return Cell("regime", labels, TASKS["first"].config, (*UPDATES, *words))

    def tables(self, records: Records) -> dict[str, str]:
        head = ["batch", "rate", *(f"{rule} at {delay}" if RULES[rule].late else rule for rule, delay in columns())]
        rows = [
            [str(batch), rate, *(self._entry(records, batch, rate, rule, delay) for rule, delay in columns())]
            for batch, rate in product(BATCHES, RATES)
        ]
        return {"regime": "## held-out loss, nats per byte, after 800 batches\n\n" + markdown(head, rows)}

    def _entry(self, records: Records, batch: int, rate: str, rule: str, delay: int) -> str:
        mine = self._seeds(records, batch, rate, rule, delay)
        above = self._above(records, batch, rate, rule, delay)
        return entry(mine, _loss, 3, "" if rule == "sync" or above is None else f" {above:+.1f} %")

    def _above(self, records: Records, batch: int, rate: str, rule: str, delay: int) -> float | None:
        """In percent of backprop's loss with the same seeds."""
        mine = self._seeds(records, batch, rate, rule, delay)
        baseline = zip(self._seeds(records, batch, rate, "sync", 0), mine, strict=True)
        own, sync = average(mine, _loss), average([one for one, run in baseline if run is not None], _loss)
        return None if own is None or sync is None else 100 * (own / sync - 1)

    def _seeds(self, records: Records, batch: int, rate: str, rule: str, delay: int) -> list[Record | None]:
        return [records.of(self.cell(batch, rate, rule, delay, seed)) for seed in SEEDS]

    def plots(self, records: Records) -> list[Plot]:
        """How far above backprop each rule ends, against the delay."""

        def line(batch: int, rate: str, rule: str) -> Line | None:
            at = [(delay, delay if RULES[rule].late else 0) for delay in DELAYS]
            points = [(x, above) for x, d in at if (above := self._above(records, batch, rate, rule, d)) is not None]
            return ([x for x, _ in points], [above for _, above in points]) if points else None

        panels = {
            f"batch {batch}, rate {rate}": {r: drawn for r in COMPARED[1:] if (drawn := line(batch, rate, r))}
            for batch, rate in product(BATCHES, RATES)
        }
        return [Plot("regime", "batches a hop", "held-out loss, % above backprop", panels, marks=True)]


def columns() -> list[tuple[str, int]]:
    """(rule, delay) of the table; what no delay changes has one."""
    return [(rule, delay) for rule in COMPARED for delay in (DELAYS if RULES[rule].late else (0,))]


def _loss(record: Record) -> float | None:
    return record.loss


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.regime", description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    add_options(parser)
    options = parser.parse_args(arguments)
    return carry_out(parser, options, RegimeStudy(tuple(options.seeds)), FOLDER)


if __name__ == "__main__":
    sys.exit(main())
