"""How many batches of a stage may lack their gradient: what bounds its memory, and hides the link's delay."""

from __future__ import annotations


class Window:
    """A fixed number of batches, or one that grows while the link's delay is what holds the stage up.

    That is so when two things meet: this stage sat blocked with its window full, and the gradient that freed it says
    that the next stage had been starved, waiting for that very batch. Then both were idle at once, and only the way
    between them was busy. (A next stage that is merely slow is never starved, and a larger window would only queue.)
    The window grows by half, and then waits for a round trip, a whole window of answers, to show the effect.

    Args:
        size: batches; None starts at 2 and grows.
        limit: batches up to which an automatic window may grow (the memory limit over a batch's bytes).
    """

    START = 2

    def __init__(self, size: int | None, limit: int = 256) -> None:
        self.automatic = size is None
        self.limit = max(self.START, limit)
        self.size = self.START if size is None else size
        self._settling = 0

    def answered(self, *, starved: bool, blocked: bool) -> None:
        """A gradient came: the next stage had been `starved` for its batch; this one was `blocked` by a full window."""
        if self._settling > 0:
            self._settling -= 1
        elif self.automatic and starved and blocked and self.size < self.limit:
            self.size = min(self.limit, self.size + max(1, self.size // 2))
            self._settling = self.size


__all__ = ["Window"]
