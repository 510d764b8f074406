"""The file of a listening socket: whose it is, and who may take it away.

nothing there                free
a socket, somebody listens   taken: to bind there would leave him listening where nobody comes
a socket, nobody listens     left by a process that was killed: taken away
anything else                somebody's data: left alone
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dnipipe.errors import ConfigError


class SocketFile:
    """One that this process has just bound."""

    def __init__(self, path: Path) -> None:
        self.path, self._mark = path, _mark(path)

    def remove(self) -> None:
        """Call it while the socket still listens: as long as it does, no other file can have the same number."""
        if self._mark and _mark(self.path) == self._mark:
            self.path.unlink(missing_ok=True)


def _mark(path: Path) -> tuple[int, int] | None:
    """Which file that is now; None if there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def free(path: Path) -> bool:
    """Whether a socket may be bound there; what a killed process has left is taken away.

    Raises ConfigError if something else than a socket lies there.
    """
    if not os.path.lexists(path):
        return True
    if not path.is_socket():
        raise ConfigError(f"{path} is to be a socket file, and what lies there is none: name another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # who has no room for one more connection listens too
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return True
        except FileNotFoundError:  # its process has ended meanwhile
            return True
        except OSError:
            return False
    return False


__all__ = ["SocketFile", "free"]
