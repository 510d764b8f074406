"""What makes a wait end early: a pipe that a poller listens to."""

from __future__ import annotations

import contextlib
import os


class Waker:
    """`wake` may be called from any thread, and in a signal handler; also after `close`. `file` is what to poll."""

    def __init__(self) -> None:
        self._alarm = False
        self.file, self._wake = os.pipe()
        os.set_blocking(self.file, False)
        os.set_blocking(self._wake, False)

    def wake(self) -> None:
        self._alarm = True
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody waits
            os.write(self._wake, b"\0")

    def was_woken(self) -> bool:
        """Since the last time that this was asked."""
        if not self._alarm:
            return False
        self._alarm = False
        with contextlib.suppress(BlockingIOError):
            os.read(self.file, 4096)
        return True

    def close(self) -> None:
        file, wake, self.file, self._wake = self.file, self._wake, -1, -1  # a late wake must hit no other file
        os.close(file)
        os.close(wake)


__all__ = ["Waker"]
