"""Whether a message is on its way here: a long one over a slow link is not there until it is whole, and is no silence.

bytes ──► the kernel, which counts them ──► libzmq ──► a message, once it is whole
             │
             └ a few a second are libzmq's heartbeats: those come from a process that hangs, too
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


class Arriving:
    """What comes over an edge's connection, from one look to the next."""

    def __init__(self) -> None:
        self._connection, self._count, self._looked = -1, 0, 0.0

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


def received(connection: int) -> int | None:
    """Bytes that have come over a tcp connection, as far as none before them is missing; None where nobody knows."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection)) as known:
        told = known.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, COUNT.stop)
        if len(told) == COUNT.stop:
            return int.from_bytes(told[COUNT], sys.byteorder)
    return None


def doubt(quiet: float, limit: float) -> str:
    """What else may have ended a connection in the middle of a message, of which nothing whole had come for `quiet`
    seconds: libzmq's heartbeats, which stand behind a frame that is on its way, give up after `limit`.
    """
    if quiet < limit:
        return ""
    return (
        f"; nothing whole had come for {quiet:.0f} s: a tensor that takes more than {limit:g} s on this link needs "
        "smaller batches, [wire], or a better link"
    )


__all__ = ["Arriving", "doubt", "received"]
