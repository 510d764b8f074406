"""A crowd of connections that say nothing is kept waiting in the kernel, and costs this process no more files.

who connects ──► the kernel ──► accepted: one of this process's files, until he has greeted or HANDSHAKE_IVL is over
                   │
                   └ once there is a crowd: WAITING of them at most, each until his first byte

A stage that connects greets at once. Not before there is a crowd: who is accepted late is a step behind with his
greeting, and if one has keys and the other has none, hears nothing of the reason.
"""

from __future__ import annotations

import socket
import sys

CROWD = 16  # connections to one edge, which is for one neighbour
WAITING = 1024  # connections
LONGEST = 3600  # seconds, after which one is accepted all the same


def keep_waiting(listening: int) -> None:
    """Whoever connects to this tcp socket from now on; `listening` is its descriptor, and stays whose it is."""
    if sys.platform != "linux":
        return
    known = socket.socket(fileno=listening)  # no copy of it: the crowd may have taken the last file
    try:
        known.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, LONGEST)
        known.listen(WAITING)
    finally:
        known.detach()


__all__ = ["CROWD", "keep_waiting"]
