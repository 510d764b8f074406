"""A predictor with the optimizer that teaches it: what rules that predict have in common, and what they share."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from dnipipe.finite import finite
from dnipipe.lessons import Replay
from dnipipe.optim import in_one_kernel
from dnipipe.predictors import Predictor
from dnipipe.trust import Trust


class Learner:
    """A predictor and its own Adam.

    Args:
        lr: of the Adam.
        replay: what an arriving gradient is learnt from with.
        rows: the share of its samples that is; the first ones, since batches are shuffled.
        careful: learn nothing from a guess that is not finite, which on a GPU has to be waited for.
        trust: in the predictor; without one, it is always trusted.
        lazily: what arrives is put off until `catch_up`; once so many are, the newest is learnt and the others never.
    """

    def __init__(
        self,
        predictor: Predictor,
        lr: float,
        replay: Replay | None = None,
        rows: float = 1.0,
        careful: bool = False,
        trust: Trust | None = None,
        lazily: int = 1,
    ) -> None:
        self.predictor = predictor
        self.adam = in_one_kernel(torch.optim.Adam, predictor.parameters(), lr=lr)
        self.parameters: list[Tensor] = list(predictor.parameters())
        self.replay = replay or Replay()
        self.rows, self.careful, self.trust = rows, careful, trust or Trust()
        self.lazily, self.unlearnt = lazily, 0
        self.put_off: deque[tuple[Tensor, Tensor, Tensor]] = deque()  # (h, y, g), the oldest first

    def guess(self, h: Tensor, y: Tensor) -> Tensor:
        """ĝ for h (B, D...), detached. A predictor with a loss of its own learns from that in the same backward."""
        predicted = self.predictor.predict(h, y)
        if predicted is not None:
            return predicted
        h = h.detach().requires_grad_()
        loss = self.predictor.own_loss(h, y)
        assert loss is not None, "a predictor does one of the two"
        loss.backward(inputs=[*self.parameters, h])  # type: ignore[no-untyped-call]
        assert h.grad is not None
        if not self.careful or finite(h.grad):
            self.adam.step()
        self.adam.zero_grad()
        return self.predictor.completed(h.detach(), y, h.grad)

    def learn(self, h: Tensor, y: Tensor, g: Tensor) -> None:
        """What the gradient g that arrived for h (both (B, D...)) teaches, at once or later."""
        if self.predictor.matching == 0:
            return
        samples = h.shape[0]
        taken = math.ceil(self.rows * samples)
        if taken < samples:  # in the unit of a batch of so many
            h, y, g = h[:taken], y[:taken], g[:taken] * (samples / taken)
        self.put_off.append((h, y, g))
        if len(self.put_off) == self.lazily:
            newest = self.put_off.pop()
            self.unlearnt += len(self.put_off)
            self.put_off.clear()
            self._study(*newest)

    def catch_up(self) -> None:
        """Learn what was put off longest."""
        self._study(*self.put_off.popleft())

    def _study(self, h: Tensor, y: Tensor, g: Tensor) -> None:
        self.predictor.observe(y, g)
        lesson = self.replay.lesson(h, y, g)
        for _ in range(self.replay.steps):
            losses = [weight * self.predictor.loss(*batch) for weight, *batch in lesson]
            torch.stack(losses).sum().backward(inputs=self.parameters)  # type: ignore[no-untyped-call]
            self.adam.step()
            self.adam.zero_grad()


__all__ = ["Learner"]
