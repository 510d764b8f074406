"""What was not let in: messages and connections, counted by reason, and spoken of once a second at most."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter

SAID_EVERY = 1.0  # seconds, at least, between two lines: who floods a stage must not flood its log

log = logging.getLogger(__name__)


class Dropped(Counter[str]):
    """Counts by reason. The doorkeeper's thread counts too: reasons of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._unsaid, self._said = 0, -math.inf  # since the last line, and when it was

    def note(self, reason: str, what: str) -> None:
        """One more, of which `what` tells."""
        self[reason] += 1
        self._unsaid += 1
        now = time.monotonic()
        if now >= self._said + SAID_EVERY:
            log.warning("%d not let in, the last (%s): %s", self._unsaid, reason, what)
            self._unsaid, self._said = 0, now


__all__ = ["Dropped"]
