"""In the place of the next stage while it is away: what it would have said is made here.

a batch         ──► no gradient came for it; the stage has learnt by its predictor, for at most `unguided` batches
an evaluation   ──► lost
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch

from dnipipe.messages import Answer, Gradient, Message
from dnipipe.service.ledger import Ledger

LOST = torch.empty(0, dtype=torch.float64)  # in the place of an answer that will never come


class StandIn:
    """Args:
    unguided: batches that the stage trains while the next one is away.
    ledger: where each of them is written down.
    """

    def __init__(self, unguided: int, ledger: Ledger) -> None:
        self.unguided, self.ledger = unguided, ledger
        self.alone = 0  # batches trained since the next stage went away
        self.answers: deque[Message] = deque()

    @property
    def left(self) -> int:
        """Batches that the stage may still train alone."""
        return max(0, self.unguided - self.alone)

    def begin(self, batches: Iterable[int], evaluations: Iterable[int]) -> None:
        """The next stage is gone, and has not answered these."""
        self.alone = 0
        self.answers.extend(Gradient(batch, None) for batch in batches)
        for number in evaluations:
            self.evaluated(number)

    def trained(self, batch: int) -> None:
        """One more batch would have been sent there."""
        self.alone += 1
        self.ledger.alone(batch)
        self.answers.append(Gradient(batch, None))

    def evaluated(self, number: int) -> None:
        """One more evaluation would have been."""
        self.answers.append(Answer(number, LOST))

    def end(self) -> int:
        """The next stage is back. How many batches it was away for."""
        alone, self.alone = self.alone, 0
        return alone


class News:
    """A line for a person, every so many seconds at most."""

    EVERY = 5.0

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self._next = say, 0.0

    def away(self, now: float, stage: int, left: int) -> None:
        if now >= self._next:
            self._next = now + self.EVERY
            self.say(f"stage {stage} is away: {left} batches left to train without it")


__all__ = ["LOST", "News", "StandIn"]
