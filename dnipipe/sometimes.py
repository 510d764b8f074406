"""Random updates: a stage that updates on a batch with a probability only, and leaves the others out.

drawn        as the rule within says
not drawn    the stage before is told at once that no gradient comes, and learns nothing from this batch; what
             comes from the next stage, if that one updated, still teaches this stage's predictor
"""

from __future__ import annotations

from torch import Tensor

from dnipipe.gradient_rules import GradientRule, Mend, Skip, Use
from dnipipe.randomness import chance


class Sometimes(GradientRule):
    """Another rule, asked only for the batches that are drawn: the paper's asynchronous updates (arXiv:1608.05343).

    There "after each forward pass every layer updates with probability p", the last layer too, and a predictor learns
    when the layer behind it updates. Under `wait` and `delayed` a stage needs every stage behind it to have updated, so
    the one n stages before the last does with probability p^(n+1): what decoupling is held against.

    Args:
        p: the probability, in (0, 1].
        seed, first_layer: with the batch id decide alone whether it is drawn, so that a resumed run draws the same.
    """

    def __init__(self, inner: GradientRule, p: float, seed: int, first_layer: int) -> None:
        self.inner, self.p, self.seed, self.first_layer = inner, p, seed, first_layer
        self.teaches, self.late, self.again = inner.teaches, inner.late, inner.again
        self.in_flight, self.stash, self.learner = inner.in_flight, inner.stash, inner.learner

    def draws(self, batch: int) -> bool:
        return chance(self.p, self.seed, self.first_layer, "update", batch)

    def settle(self) -> None:
        self.inner.settle()

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | Skip | None:
        return self.inner.now(batch, h, y) if self.draws(batch) else Skip("not drawn")

    def arrived(
        self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None
    ) -> Use | Mend | None:
        use = self.inner.arrived(batch, h, y, g, predicted)
        return use if self.draws(batch) else None


__all__ = ["Sometimes"]
