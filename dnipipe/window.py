"""How many batches of a stage may lack their gradient: what bounds its memory, and hides the link's delay."""

from __future__ import annotations

import math


class Window:
    """A fixed number of batches, or one that grows while the link's delay is what holds the stage up.

    That is so when two things meet: this stage sat blocked with its window full, and the gradient that freed it says
    that the next stage had been starved, waiting for that very batch. Then both were idle at once, and only the way
    between them was busy. (A next stage that is merely slow is never starved, and a larger window would only queue.)
    The window grows to a quarter more than would have kept the stage busy, since no two batches take equally long; at
    first it doubles, for nothing is measured yet, then to four times its size at most. And each time it waits until
    what was under way has been answered, to see the effect.

    Args:
        size: batches; None starts at 2 and grows.
        limit: batches up to which an automatic window may grow (the memory limit over a batch's bytes).
        memory: bytes that what waits may take, whatever its shape, once START batches do.
    """

    START = 2
    SPARE = 1.25
    AT_FIRST, LATER = 2, 4  # times its size, that it grows to at most

    def __init__(self, size: int | None, limit: int = 256, memory: float = math.inf) -> None:
        self.automatic = size is None
        self.limit = max(self.START, limit)
        self.memory = memory
        self.size = self.START if size is None else size
        self._settling = 0
        self._grown: tuple[float, float] | None = None  # `now` and `waited` when it last did

    def answered(self, *, starved: bool, blocked: bool, now: float, waited: float) -> None:
        """A gradient came: the next stage had been `starved` for its batch; this one was `blocked` by a full window.

        now: seconds, of any clock. waited: of these, those that a full window has cost so far.
        """
        if self._settling > 0:
            self._settling -= 1
        elif self.automatic and starved and blocked and self.size < self.limit:
            enough = self._enough(now, waited)
            self._settling, self._grown = self.size - 1, (now, waited)
            self.size = min(self.limit, max(self.size + 1, enough))

    def _enough(self, now: float, waited: float) -> int:
        """Batches that would have kept the stage busy since the window last grew, and some to spare."""
        if self._grown is None or now <= self._grown[0]:
            return self.AT_FIRST * self.size
        since, before = self._grown
        busy = max(self.SPARE / self.LATER, 1 - (waited - before) / (now - since))
        return math.ceil(self.SPARE * self.size / busy)


__all__ = ["Window"]
