"""How long a stage has had nothing left to do but wait for a neighbour that is away.

    gone ──► trains on without it … the last batch that it may ──► waits ────────────► service.patience: WaitTimeout
                                                             counted from here ┘

What else comes or goes meanwhile ends no wait: reports of the other neighbour, evaluations of the run's end that are
lost as often as they are asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from dnipipe.errors import WaitTimeout
from dnipipe.transport import Side


class Absence:
    """Of the neighbours of stage `index`, which waits `patience` seconds for them."""

    def __init__(self, index: int, patience: float, now: Callable[[], float] = time.monotonic) -> None:
        self.index, self.patience, self.now = index, patience, now
        self._since: dict[Side, float] = {}  # of those that are away

    def gone(self, side: Side) -> None:
        self._since.setdefault(side, self.now())

    def back(self, side: Side) -> None:
        self._since.pop(side, None)

    def worked(self) -> None:
        """The stage did what it can do alone: its wait begins anew."""
        self._since = dict.fromkeys(self._since, self.now())

    def stood(self, seconds: float) -> None:
        """This process itself has not listened for so long: who is away may have come meanwhile."""
        self._since = {side: since + seconds for side, since in self._since.items()}

    def check(self, sides: Iterable[Side]) -> None:
        """Raises WaitTimeout if one of these has been waited for long enough."""
        for side in sides:
            waited = self.now() - self._since.get(side, self.now())
            if waited >= self.patience:
                other = self.index + (1 if side is Side.NEXT else -1)
                raise WaitTimeout(
                    f"stage {self.index} waited {waited:.0f} s for stage {other}, which is away (service.patience = "
                    f"{self.patience:g}): start it"
                )


__all__ = ["Absence"]
