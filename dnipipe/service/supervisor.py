"""Keeps one stage running: starts its process, and starts it again when it dies.

crash, kill, hang (the process ends itself)     again, at once, and it is said why; it goes on from its own state
the same within 10 s of its start               again, after 1, 2, 4 … 30 s
0: the run is over, or another process took its place      ends
2: a setting must be mended                                 ends, and so does its status
3: it waited too long for a neighbour, or met with a NaN    ends

SIGTERM, Ctrl-C, and the end of the terminal (SIGHUP) are the stage's: it saves, and both end. The stage is in a session
of its own, so that it hears of none of them twice; and it looks who its parent is: if this one is killed, it ends.

To import torch takes most of the time in which a process starts. Where it is safe to fork behind it, this process
imports it once, and each of the stage's begins with it (`FORKS`; elsewhere each is a new interpreter):

    supervisor ── imports torch, and waits ──┬─────────────────────┬───────────────────►
                                             └─ the stage … killed └─ the stage, at once
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from threading import Event
from types import FrameType

from dnipipe.started import importing, unheard

FORKS = sys.platform == "linux"  # macOS: its own libraries do not stand it
FINAL = (0, 2, 3)
LONGEST = 30.0  # seconds between two starts
CALM = 10.0  # seconds that a process must have lived to be started again at once: it does not die of its start


class _AskedToEnd(Exception):
    """A signal came while no process was there to pass it on to."""


def supervise(
    part: Callable[[], int],
    stage: int,
    restarts: int,
    stood: Callable[[float], str] = lambda lived: "",
    imports: Sequence[str] = (),
) -> int:
    """Run `part` in a process of its own until it ends for good, at most `restarts` times more; its status.

    Args:
        part: the stage, from its start to its exit status.
        stood: of a process that lived so many seconds: that it hung, "" if it did not.
        imports: modules with which its processes begin, where this one FORKS.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the libraries that would start threads here
    asked = False
    context = multiprocessing.get_context("fork" if FORKS else "spawn")
    child: multiprocessing.process.BaseProcess | None = None

    def end(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if child is None or not child.is_alive():
            raise _AskedToEnd
        child.terminate()

    before = {number: signal.signal(number, end) for number in _asking()}
    wait = 0.0
    try:
        with importing():
            for module in imports if FORKS else ():
                with suppress(ImportError):  # what cannot be imported is missed, if at all, where it is used
                    import_module(module)
        for left in range(restarts, -1, -1):
            began = time.monotonic()
            with unheard(*before):  # as long as the new process has this one's handlers, and this one does not know it
                started = context.Process(target=_stage, args=(part,))  # type: ignore[attr-defined]
                started.start()
                child = started
            status = _joined(started)
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
        if child and child.is_alive():
            child.kill()
            child.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stage(part: Callable[[], int]) -> None:
    """The body of the stage's process: a session of its own, and signals as any new process has them."""
    os.setsid()
    asking = _asking()
    for number in asking:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, asking)
    sys.exit(part())


def _joined(child: multiprocessing.process.BaseProcess) -> int:
    """Its exit status; that of a signal is negative."""
    child.join()
    assert child.exitcode is not None
    return child.exitcode


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


__all__ = ["FORKS", "supervise"]
