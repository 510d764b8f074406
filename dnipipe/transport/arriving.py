"""Whether a message is on its way here: a long one over a slow link is not there until it is whole, and is no silence.

bytes ──► the kernel, which counts them ──► libzmq ──► a message, once it is whole
             │
             ├ a few a second are libzmq's heartbeats: those come from a process that hangs, too
             └ none at all: it was stopped
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time

HEARTBEATS = 256  # bytes a second, at most: a ping and a pong, of 9 and 7 bytes, sealed by CURVE (limits.py)
LEAST = 1024  # bytes besides, by which a message is told from them
COUNT = slice(128, 136)  # tcpi_bytes_received in struct tcp_info (linux/tcp.h, since 4.1)
APART = 3.0  # seconds between two looks, beyond which they do not tell what was between them
TELLS = sys.platform == "linux"


class Arriving:
    """What comes over an edge's connection, from one look to the next."""

    def __init__(self) -> None:
        self._connection, self._count, self._looked = -1, 0, 0.0
        self._last, self._last_look, self._moved = (-1, 0), 0.0, 0.0  # connection and count; and when that changed

    def more(self, connection: int, since: float) -> bool:
        """Whether more than heartbeats came since the last look, which was at `since` (time.monotonic) or later.

        `connection` is its descriptor. Where the kernel does not tell, nothing comes.
        """
        count, now = received(connection), time.monotonic()
        if count is None:
            return False
        known = connection == self._connection and count >= self._count and self._looked >= since
        more = known and count - self._count > LEAST + HEARTBEATS * (now - self._looked)
        if more or not known:
            self._connection, self._count, self._looked = connection, count, now
        return more

    def still(self, connection: int) -> float:
        """Seconds for which nothing came, not even a heartbeat, as far as looks in a row can tell; 0: nobody knows."""
        count, now = received(connection), time.monotonic()
        if count is None:
            return 0.0
        if self._last != (connection, count) or now - self._last_look > APART:
            self._moved = now
        self._last, self._last_look = (connection, count), now
        return now - self._moved


def received(connection: int) -> int | None:
    """Bytes that have come over a tcp connection, as far as none before them is missing; None where nobody knows."""
    if not TELLS:
        return None
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection)) as known:
        told = known.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, COUNT.stop)
        if len(told) == COUNT.stop:
            return int.from_bytes(told[COUNT], sys.byteorder)
    return None


__all__ = ["Arriving", "received"]
