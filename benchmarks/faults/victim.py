"""One stage that can be told to fail: `dnipipe stage`, and a hook that reads an order before a forward.

    python -m benchmarks.faults.victim CONFIG --index 1 --rate 20        its supervisor, and under it its process

An order is the name of one of ORDERS in RUN/stage-K/order; it is taken once, in the middle of the stage's own work.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.faults import witness
from dnipipe.config import load

LOOK = 0.05  # seconds between two looks for an order
LONG = 3600  # seconds: for ever
CHUNK = 16 * 2**20  # bytes taken at once by a stage that runs out of memory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.0, help="batches a second that stage 0 begins at most")
    parser.add_argument("--no-restart", action="store_true")
    options = parser.parse_args(arguments)
    config = load(options.config)
    if options.no_restart:
        from dnipipe import cli

        witness.attend(options.config.parent / f"witness-{options.index}")
        arm(Path(config.output.run) / f"stage-{options.index}", options.rate if options.index == 0 else 0.0)
        return cli.main(["stage", str(options.config), "--index", str(options.index), "--no-restart"])
    from dnipipe.cli import STAGE
    from dnipipe.service.supervisor import supervise

    own = [str(options.config), f"--index={options.index}", f"--rate={options.rate}", "--no-restart"]
    return supervise(partial(main, own), options.index, config.service.restarts, imports=STAGE)


def arm(folder: Path, rate: float) -> None:
    """Before a forward that trains: wait for its turn, if there is a rate, and look for an order."""
    import torch.nn as nn
    from torch.nn.modules.module import register_module_forward_pre_hook

    order, looked, turn = folder / "order", 0.0, 0.0

    def before(module: nn.Module, _: object) -> None:
        nonlocal looked, turn
        if not module.training:
            return
        now = time.monotonic()
        if rate and isinstance(module, nn.Sequential):  # the stage's own layers
            select.select([], [], [], max(0.0, turn - now))  # time.sleep fails under libfaketime (clocks.py)
            turn = max(turn, now) + 1 / rate
        if now < looked + LOOK:
            return
        looked = now
        if order.exists():
            name = order.read_text()
            order.unlink()
            ORDERS[name]()

    register_module_forward_pre_hook(before)


# -- orders ------------------------------------------------------------------------------------------------------


def _raise() -> None:
    raise RuntimeError("an order of benchmarks.faults")


def _use_up() -> None:
    """All the memory there is, until the kernel ends this process: it is in a group with a limit by then."""
    taken = []
    while True:
        taken.append(b"x" * CHUNK)


ORDERS: dict[str, Callable[[], object]] = {
    "hang": lambda: time.sleep(LONG),
    "hang with the interpreter's lock": lambda: ctypes.PyDLL(None).sleep(LONG),
    "segmentation fault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(9),
    "exception": _raise,
    "out of memory": _use_up,
}

if __name__ == "__main__":
    sys.exit(main())
