"""How this process was started: by a person, by torchrun, or by dnipipe's own launcher. No torch: this comes first."""

from __future__ import annotations

import contextlib
import os
import signal

LAUNCHED = "DNIPIPE_LAUNCHED"  # set in the processes that the launcher starts; its value is for them


def is_worker() -> bool:
    """Whether this process is one of a pipeline, started by torchrun or by `launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_quietly_on_interrupt() -> None:
    """In a process that the launcher started: Ctrl-C while it still imports ends it, without a traceback from each.

    Later the worker's own handler takes over, which ends the run in order.
    """
    if LAUNCHED in os.environ:
        with contextlib.suppress(ValueError):  # imported in a thread: signals are the main thread's
            signal.signal(signal.SIGINT, signal.SIG_DFL)


__all__ = ["LAUNCHED", "end_quietly_on_interrupt", "is_worker"]
