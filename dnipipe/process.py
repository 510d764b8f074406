"""The edge of a stage's process: what ended it, as an exit status, one line, and a record for the launcher."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dnipipe.building import Job
from dnipipe.errors import ConfigError, DnipipeError, PeerLost, PeerStopped
from dnipipe.laboratory import work as work_here
from dnipipe.session import work
from dnipipe.started import LAUNCHED, is_worker

Work = Callable[[Job, bool], Path]  # a job, whether to resume it -> the run's folder


def guarded(
    job: Job, resume: bool = False, debug: bool = False, part: Work | None = None, name: str = "run"
) -> tuple[int, Path]:
    """Run this process's stage. Returns its exit status and the run's folder, which stage 0 chose.

    The status: 0, 2 for what can be mended, 1 for what cannot. part: what is done, if it is not to train the job.
    name: of a run whose folder the settings do not name.
    """
    folder = Path(job.config.output.run)
    handler = get_error_handler() if is_worker() else None
    if handler:
        handler.initialize()
    try:
        torch.set_num_threads(_threads())
        return 0, part(job, resume) if part else _training(job.config.transport.kind)(job, resume, name)
    except KeyboardInterrupt:  # before the loop, which ends in order (see Worker.interrupt)
        return 128 + signal.SIGINT, folder
    except Exception as error:
        if handler:  # the launcher ends all when one has ended: not before this one has said why, with its own status
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        expected = isinstance(error, DnipipeError)
        if debug or not expected:
            traceback.print_exc()
        line = str(error) if expected else f"{type(error).__name__}: {error}"
        if handler and not isinstance(error, (PeerLost, PeerStopped)):
            # a stage that lost its neighbour is not the cause, and so leaves no record
            handler.record_exception(type(error)(line) if expected else error)
        if LAUNCHED not in os.environ:
            where = f"stage {os.environ['RANK']}: " if "RANK" in os.environ else ""
            sys.stderr.write(f"dnipipe: {where}{line}\n")  # in one piece: others write here too
        return error.exit_status if isinstance(error, DnipipeError) else 1, folder


def _threads() -> int:
    """Of one operation; 1 unless OMP_NUM_THREADS says more. Raises ConfigError."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip() or "1"  # it may be a list, by nesting
    if not said.isdecimal() or not int(said):
        raise ConfigError(f"OMP_NUM_THREADS = {said!r}: expected a whole number, at least 1")
    return int(said)


def _training(kind: str) -> Callable[[Job, bool, str], Path]:
    if kind != "local":
        return work
    if is_worker():
        raise ConfigError("transport.kind = local trains all stages in one process: start it without torchrun")
    return work_here


__all__ = ["guarded"]
