"""Keeps one stage running: starts its process, and starts it again when it dies.

crash, kill, hang (the process ends itself)     again, at once, and it is said why; it goes on from its own state
the same within 10 s of its start               again, after 1, 2, 4 … 30 s
0: the run is over, or another process took its place      ends
2: a setting must be mended                                 ends, and so does its status
3: it waited too long for a neighbour, or met with a NaN    ends

SIGTERM, Ctrl-C, and the end of the terminal (SIGHUP) are the stage's: it saves, and both end. The stage is in a session
of its own, so that it hears of none of them twice; and it looks who its parent is: if this one is killed, it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from threading import Event
from types import FrameType

FINAL = (0, 2, 3)
LONGEST = 30.0  # seconds between two starts
CALM = 10.0  # seconds that a process must have lived to be started again at once: it does not die of its start


class _AskedToEnd(Exception):
    """A signal came while no process was there to pass it on to."""


def supervise(
    command: Sequence[str], stage: int, restarts: int, stood: Callable[[float], str] = lambda lived: ""
) -> int:
    """Run `command` (arguments of this Python) until it ends for good, at most `restarts` times more; its status.

    stood: of a process that lived so many seconds: that it hung, "" if it did not.
    """
    asked = False
    child: subprocess.Popen[bytes] | None = None

    def end(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if child is None or child.poll() is not None:
            raise _AskedToEnd
        child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, end) for number in _asking()}
    wait = 0.0
    try:
        for left in range(restarts, -1, -1):
            began = time.monotonic()
            child = subprocess.Popen(
                [sys.executable, *command], env={"OMP_NUM_THREADS": "1", **os.environ}, start_new_session=True
            )
            status = child.wait()
            if asked or status in FINAL:
                return max(0, status)
            lived = time.monotonic() - began
            wait = 0.0 if lived > CALM else wait
            causes = [cause for cause in (_cause(status), stood(lived)) if cause]
            # in one piece: others write here too
            sys.stderr.write(f"stage {stage}: {'; '.join(causes)}; {_next(left, wait)}\n")
            if left:
                Event().wait(wait)  # which a signal ends
            wait = min(LONGEST, max(1.0, 2 * wait))
        return 1
    except _AskedToEnd:
        return 0
    finally:
        if child and child.poll() is None:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _asking() -> list[signal.Signals]:
    """Signals that ask it to end. Under nohup the end of the terminal is none of them."""
    hears = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *[signal.SIGHUP] * hears]


def _cause(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _next(left: int, wait: float) -> str:
    if not left:
        return "not started again: service.restarts is used up"
    return f"started again {f'in {wait:g} s' if wait else 'at once'} (at most {left} times more)"


__all__ = ["supervise"]
