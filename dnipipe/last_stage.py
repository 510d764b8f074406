"""The last stage's gradient, for it has the loss in the place of a rule; and its answer to an evaluation.

h, y ──► loss(h, y) ──► ∂loss/∂h: applied and sent back at once; nothing arrives
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dnipipe.beside import NOWHERE, Beside, Done
from dnipipe.errors import NonFiniteLoss
from dnipipe.finite import CURES
from dnipipe.gradient_rules import GradientRule, Skip, Use
from dnipipe.labels import class_axis, loss_terms
from dnipipe.predictors import Loss


class LossGradient(GradientRule):
    """The last stage's: it knows the loss, so its gradient is the true one, at once.

    Args:
        loss: (output, labels) -> mean loss over the batch, 0-dim.
        teaches: whether the rule of the stages before learns from gradients.
        observe: told the loss of every batch (0-dim, detached) and its number of terms.
        stop_on_nan: raise NonFiniteLoss, or else skip the batch.
        beside: of the stage. On a GPU of its own, a loss that would end the run is read while the next batch is under
            way (or by `settle`), so that the host need not wait for each forward; to skip a batch, it does wait.
    """

    def __init__(
        self,
        loss: Loss,
        teaches: bool,
        observe: Callable[[Tensor, Tensor | int], None],
        stop_on_nan: bool = True,
        beside: Beside = NOWHERE,
    ) -> None:
        self.loss = loss
        self.teaches = teaches
        self.observe = observe
        self.stop_on_nan = stop_on_nan
        self.beside = beside
        self._unread: tuple[int, Tensor, Done] | None = None  # batch id, its loss, and whether that is there

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | Skip:
        h = h.detach().requires_grad_()
        value = self.loss(h, y)
        if self.stop_on_nan:
            self._check(batch, value)
        elif not torch.isfinite(value):
            return Skip("loss not finite")
        (g,) = torch.autograd.grad(value, h)
        self.observe(value.detach(), loss_terms(y))
        return Use(g, update=True, send=True)

    def _check(self, batch: int, value: Tensor) -> None:
        """Raises NonFiniteLoss for this batch; or for the last one, and then this one's turn is with the next."""
        if not self.beside.are_there:
            _stop_unless_finite(batch, value)
            return
        self.settle()
        self._unread = batch, self.beside.take(value), self.beside.mark()

    def settle(self) -> None:
        if self._unread is not None:
            batch, value, done = self._unread
            done(True)
            self._unread = None
            _stop_unless_finite(batch, value)

    def arrived(self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None) -> Use | None:
        raise AssertionError("no stage follows the last")


def _stop_unless_finite(batch: int, value: Tensor) -> None:
    if not torch.isfinite(value):
        raise NonFiniteLoss(f"the loss is {value.item()} at batch {batch}: {CURES}")


def score(h: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """(sum of losses, correct, loss terms, samples) as float64 (4,); correct is -1 where labels are no classes of h's:
    whole numbers may also be targets of their own (several labels a sample, bytes of an image, a count). A label that
    is ignored is no term, and no guess is correct there.
    """
    terms = int(loss_terms(y))
    with torch.no_grad():
        total = loss(h, y).double() * terms
    correct = torch.tensor(-1.0)
    axis = class_axis(tuple(h.shape), tuple(y.shape))
    if axis is not None and not y.is_floating_point():
        correct = (h.argmax(axis) == y).sum()
    return torch.tensor([total.item(), correct.item(), terms, y.shape[0]], dtype=torch.float64)


__all__ = ["LossGradient", "score"]
