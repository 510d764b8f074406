"""Start the K processes of a run on this machine, through torch.distributed's own launcher, and say what ended it.

The processes run the same command again, with the environment that torchrun would give them. What is added to torchrun:
nothing restarts, its log is quiet, and the first failure, by stage, rank and cause, is the last line printed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dnipipe.loopback import LOOPBACK, register
from dnipipe.started import LAUNCHED

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torch's launcher


def launch(stages: int, command: Sequence[str], mark: str = "1", debug: bool = False, where: str = "") -> int:
    """Run `command` (arguments of this Python) once for each stage, in the folder `where` (this one), and wait for all.
    Returns the exit status.

    The status is 0; or that of the first failure (1 for a killed process), which is printed; or 128 + the signal that
    asked this process to end.
    """
    if not debug:
        _hush("torch.distributed.elastic")
    logs = tempfile.mkdtemp(prefix="dnipipe-logs-")
    launching = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=stages,
        run_id="dnipipe",
        rdzv_backend=register(),
        rdzv_endpoint=LOOPBACK,
        local_addr=LOOPBACK,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    try:
        with _left_as_it_was():
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: K processes share this machine's cores
            os.environ[LAUNCHED] = mark
            os.chdir(where or os.curdir)
            elastic_launch(launching, sys.executable)(*command)
    except ChildFailedError as error:
        failure = first_failure(error.failures)
        print(f"dnipipe: {failure_line(failure)}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    return 0


def _hush(package: str) -> None:
    """No log lines from a package whose modules' loggers have levels of their own."""
    for name in [package, *(name for name in logging.root.manager.loggerDict if name.startswith(f"{package}."))]:
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """The environment, the folder, and the signal handlers, which torch's launcher changes: a user's script goes on
    behind it."""
    environment, folder = dict(os.environ), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def first_failure(failures: dict[int, ProcessFailure]) -> ProcessFailure:
    """The failure that caused the others: a process that a signal killed, else the first that said why it ended.

    A stage that only lost its neighbour records nothing (see `record`), so it cannot be taken for the cause.
    """
    ended = list(failures.values())
    killed = [f for f in ended if f.exitcode < 0 and -f.exitcode != signal.SIGTERM]
    spoke = [f for f in ended if f.error_file_data != {} and f.error_file != "<N/A>"]
    return min(killed or spoke or ended, key=lambda f: f.timestamp)


def failure_line(failure: ProcessFailure) -> str:
    rank = failure.local_rank  # one machine: the rank among all, and the stage
    cause = _said(failure) or (
        f"killed by {signal.Signals(-failure.exitcode).name}"
        if failure.exitcode < 0
        else f"ended with status {failure.exitcode}"
    )
    return f"first failure: stage {rank} (rank {rank}, pid {failure.pid}): {cause}"


def _said(failure: ProcessFailure) -> str:
    """What the process wrote into its error file."""
    try:
        with open(failure.error_file) as file:
            return str(json.load(file)["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


__all__ = ["failure_line", "first_failure", "launch"]
