"""The batches of a stage that guesses its own inputs, while the stage before it is away: drawn here.

    Input 97, 98 ─► gone ─► is what is drawn here for 98 what came?   yes ─► 99, 100, … at most `most` of them
                                                                      no  ─► said, and it waits, now and later

An id means the same batch whoever draws it (data/drawn.py), if the data are the same: so that is looked at, each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dnipipe.messages import Input
from dnipipe.pairs import Given, parted

Drawing = Callable[[int], Iterator[tuple[int, Given, Tensor]]]  # no pairs: forward_unlock, whose this is, refuses them


class Draws:
    """What a stage may train on by itself.

    Args:
        drawing: start -> (batch id, x, y) of the ids behind it, to the run's last. most: batches in one absence.
        say: takes a line for a person.
    """

    def __init__(self, drawing: Drawing, most: int, say: Callable[[str], None]) -> None:
        self.drawing, self.most, self.say = drawing, most, say
        self.count = 0  # batches drawn in this absence
        self.last = 0  # the id of the last one
        self._came: Input | None = None  # the last batch that the stage before sent
        self._batches: Iterator[tuple[int, Given, Tensor]] | None = None
        self._other = False  # its data are not those of stage 0

    @property
    def left(self) -> int:
        """Batches that may still be drawn; none before one has come: there is nothing to compare the data with."""
        return 0 if self._other or self._came is None else self.most - self.count

    def came(self, message: Input) -> None:
        """The stage before is there, and sent this."""
        self._came, self._batches, self.count = message, None, 0

    def next(self, behind: int) -> Input | None:
        """The first batch behind this id; None if there is none, or none may be drawn. Raises DataError."""
        if self.left <= 0:
            return None
        if self._batches is None and not self._same():
            return None
        for batch, x, y in self._batches or ():
            if batch > behind:
                self.count, self.last = self.count + 1, batch
                return Input(batch, parted(x)[0], y)
        return None

    def _same(self) -> bool:
        """Whether what is drawn for the batch that came is what came; the next ones follow it."""
        assert self._came is not None
        self._batches = self.drawing(self._came.batch - 1)
        first = next(self._batches, None)
        came = self._came.x, self._came.y
        self._other = not (first and _equal(parted(first[1])[0], came[0]) and _equal(first[2], came[1]))
        if self._other:
            self.say(
                f"what is drawn here for batch {self._came.batch} is not what came: data.root or data.name names other "
                "data than at stage 0; give this stage the same, or it waits while the stage before is away"
            )
        return not self._other


def _equal(here: Tensor, there: Tensor) -> bool:
    return here.dtype == there.dtype and torch.equal(here, there.cpu())


__all__ = ["Draws"]
