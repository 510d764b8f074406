"""Blend where only each n-th batch's gradient is carried (wire.gradient_every): the others keep to their prediction.

batch        1    2    3    4    5    6    7    8            n = 4
at once      ĝ    ĝ    ĝ    ĝ    ĝ    ĝ    ĝ    ĝ
when g comes                4 ◄─ g − ĝ          8 ◄─ g − ĝ   their second backward, stash and graph: a part of the cost
"""

from __future__ import annotations

from torch import Tensor

from dnipipe.gradient_rules import GradientRule, Skip, Use
from dnipipe.phases import ByBatch


class Unanswered(GradientRule):
    """A rule's batch whose gradient is not carried: the prediction, as far as it is trusted, is all there will be.

    The stage before is told so at once. Nothing of the batch is kept for a second backward.
    """

    teaches = False

    def __init__(self, inner: GradientRule) -> None:
        self.inner, self.learner = inner, inner.learner

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | Skip | None:
        use = self.inner.now(batch, h, y)
        if not isinstance(use, Use):
            return use
        self.inner.arrived(batch, h, y, None, use.g)
        return Use(use.g, use.update, send=True)

    def arrived(self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None) -> None:
        return None


class Turns(ByBatch):
    """Each n-th batch is one rule's, the others are another's: by batch id, so that all stages agree.

    Args: one, others: of the same learner. every: n.
    """

    def __init__(self, one: GradientRule, others: GradientRule, every: int) -> None:
        super().__init__((one, others))
        self.every = every

    def at(self, batch: int) -> GradientRule:
        one, others = self.rules
        return others if batch % self.every else one


__all__ = ["Turns", "Unanswered"]
