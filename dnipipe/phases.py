"""A run that changes its rule: one rule after another, by batch id, so that every stage changes at the same batch.

batch      1 ──── local ──── 500 │ 501 ──── synthetic ──── …        rule.name = "local", rule.then = "501:synthetic"
predictor  ─────────────────────────────────────────────►           one, with one optimizer, for all of them
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor

from dnipipe.gradient_rules import GradientRule, Mend, Skip, Use


class ByBatch(GradientRule):
    """Several rules, of which each batch belongs to one, for good: a gradient that comes late finds its own rule.

    Args: rules; those with a predictor share one Learner.
    """

    def __init__(self, rules: Sequence[GradientRule]) -> None:
        self.rules = rules
        self.teaches = any(rule.teaches for rule in rules)
        self.learner = next((rule.learner for rule in rules if rule.learner), None)

    def settle(self) -> None:
        for rule in self.rules:
            rule.settle()

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | Skip | None:
        return self.at(batch).now(batch, h, y)

    def arrived(
        self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None
    ) -> Use | Mend | None:
        return self.at(batch).arrived(batch, h, y, g, predicted)


class Phases(ByBatch):
    """One rule after another.

    Args: rules: (first batch id, rule), ascending, the first from 1 on.
    """

    def __init__(self, rules: Sequence[tuple[int, GradientRule]]) -> None:
        super().__init__([rule for _, rule in rules])
        self.starts = [start for start, _ in rules]

    def at(self, batch: int) -> GradientRule:
        return self.rules[bisect_right(self.starts, batch) - 1].at(batch)


__all__ = ["ByBatch", "Phases"]
