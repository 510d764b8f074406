"""How this process was started: by a person, by torchrun, or by dnipipe's own launcher. No torch: this comes first."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass

LAUNCHED = "DNIPIPE_LAUNCHED"  # set in the processes that the launcher starts; its value is for them
ALONE = "DNIPIPE_ALONE"  # set where a script is run as one stage by itself (service/own.py): an Alone
try:
    HERE = os.getcwd()  # where this process was started: a script may change that before it trains
except OSError:  # the folder is gone
    HERE = "/"


@dataclass(frozen=True)
class Alone:
    """This process is stage `index` of the script's first fit, and no more."""

    index: int
    run: str  # the run's folder
    restarts: int  # how often its supervisor starts it again
    settings: tuple[str, ...]  # words of the command line, `--section.key value`

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def alone() -> Alone | None:
    """How a script was started as one stage by itself; None if it was not."""
    if ALONE not in os.environ:
        return None
    told = json.loads(os.environ[ALONE])
    return Alone(**{**told, "settings": tuple(told["settings"])})


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


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """What is imported within stays to the end, so Python's collector does not look through it, now or later. With
    torch's 300,000 objects it would, again and again, for a third of the time in which a process starts.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


@contextlib.contextmanager
def unheard(*numbers: int) -> Iterator[None]:
    """Processes started within do not hear Ctrl-C, which a terminal sends to all: the workers of a DataLoader are to
    live until the run, which hears of it, has ended in order. This process hears of it behind the `with`.
    `numbers`: of other signals in its place.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers or {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


__all__ = [
    "ALONE",
    "HERE",
    "LAUNCHED",
    "Alone",
    "alone",
    "end_quietly_on_interrupt",
    "importing",
    "is_worker",
    "unheard",
]
