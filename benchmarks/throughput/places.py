"""Where the ranks of a run are: all on this machine, in emulated hosts on it, or one here and the others elsewhere.

none       all here, over loopback                                     nothing to install, no delay
emulated   each in a host of its own (benchmarks/emulator.py)          root, ip, /dev/net/tun
hosts      one on each machine that torchrun has started this on       real links
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.cells import ROOT
from benchmarks.emulator import Emulator, Link, missing
from benchmarks.grid import cores
from benchmarks.throughput.rank import Order
from benchmarks.throughput.window import Measured

LIMIT = 600.0  # seconds of one run


class RunFailed(Exception):
    """A rank ended with an error, or none ended in time; its last words."""


class Place(Protocol):
    """What can run a list of orders, one a rank."""

    reports: bool  # whether this process is the one that writes results

    def run(self, orders: Sequence[Order], link: Link) -> list[Measured]:
        """All at once; what each rank measured, by rank. Raises RunFailed."""


class Here:
    """All ranks on this machine; `emulator` if each has a host of its own."""

    reports = True

    def __init__(self, emulator: Emulator | None = None) -> None:
        self.emulator = emulator

    def run(self, orders: Sequence[Order], link: Link) -> list[Measured]:
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / f"{rank}.json" for rank in range(len(orders))]
            self._carry_out([_command(order, out) for order, out in zip(orders, outs, strict=True)], outs, link)
            return [Measured(**json.loads(out.read_text())) for out in outs]

    def train(self, arguments: Sequence[str], stages: int, link: Link) -> None:
        """`dnipipe train` with these arguments, a stage in each host. Raises RunFailed."""
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / str(rank) for rank in range(stages)]
            self._carry_out([["dnipipe", "train", *arguments]] * stages, outs, link)

    def _carry_out(self, commands: Sequence[Sequence[str]], outs: Sequence[Path], link: Link) -> None:
        """A Python module with its arguments on each rank, all at once; what one says goes beside its `out`."""
        if self.emulator:
            self.emulator.link = link
        port = _free_port()
        with _ended() as processes:
            for rank, (command, out) in enumerate(zip(commands, outs, strict=True)):
                processes.append(self._start(rank, len(commands), command, out, port))
            _wait(processes, outs)

    def _start(self, rank: int, world: int, command: Sequence[str], out: Path, port: int) -> subprocess.Popen[bytes]:
        master = self.emulator.address(0) if self.emulator else "127.0.0.1"
        card = "eth0" if self.emulator else "lo"
        within = self.emulator.within(rank) if self.emulator else []
        own = {"GROUP_WORLD_SIZE": str(world if self.emulator else 1), "GLOO_SOCKET_IFNAME": card}
        return _start(within, environment(rank, world, master, port) | own, command, out, core=_core(rank))


class Hosts:
    """This machine's rank of a run on several, which torchrun has started this same command on."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.reports = self.rank == 0
        self.master, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store = TCPStore(
            self.master, self.port, is_master=not agents and self.rank == 0, timeout=timedelta(seconds=LIMIT)
        )
        self.runs = 0

    def run(self, orders: Sequence[Order], link: Link) -> list[Measured]:
        self.runs += 1
        if self.rank < len(orders):
            with tempfile.TemporaryDirectory() as folder, _ended() as processes:
                out = Path(folder) / "out.json"
                names = environment(self.rank, len(orders), self.master, self.port + self.runs)
                processes.append(_start([], names, _command(orders[self.rank], out), out, core=None))
                try:
                    _wait(processes, [out])
                    self.store.set(f"measured/{self.runs}/{self.rank}", out.read_text())
                except RunFailed as error:
                    self.store.set(f"measured/{self.runs}/{self.rank}", json.dumps({"failed": str(error)}))
        found = [json.loads(self.store.get(f"measured/{self.runs}/{rank}")) for rank in range(len(orders))]
        for rank, values in enumerate(found):
            if "failed" in values:
                raise RunFailed(f"rank {rank}: {values['failed']}")
        return [Measured(**values) for values in found]


@contextmanager
def place(links: str, hosts: int) -> Iterator[Place]:
    """The place that `--links` names, with so many hosts. Raises SystemExit if this machine cannot be it."""
    if links == "hosts":
        if "RANK" not in os.environ:
            raise SystemExit("--links hosts: start this command with torchrun, one process on each machine")
        yield Hosts()
    else:
        with here(links, hosts) as where:
            yield where


@contextmanager
def here(links: str, hosts: int) -> Iterator[Here]:
    """The same where all ranks are on this machine: `none` or `emulated`."""
    if links == "none":
        yield Here()
        return
    if lack := missing():
        raise SystemExit(f"--links emulated needs {lack} on this machine: use --links none, or hosts")
    with Emulator(hosts) as emulator:
        yield Here(emulator)


def environment(rank: int, world: int, master: str, port: int) -> dict[str, str]:
    """What torchrun would set, without an agent of its own."""
    names = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "GROUP_WORLD_SIZE": world,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": master,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # no line for each address without a name
    }
    outer = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    return {**outer, **{name: str(value) for name, value in names.items()}}


def _command(order: Order, out: Path) -> list[str]:
    return ["benchmarks.throughput.rank", order.to_json(), str(out)]


def _start(
    within: list[str], names: dict[str, str], command: Sequence[str], out: Path, core: int | None
) -> subprocess.Popen[bytes]:
    whole = [*within, sys.executable, "-m", *command]
    with out.with_suffix(".err").open("w") as said:
        process = subprocess.Popen(
            whole, cwd=ROOT, env=names, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    return process


@contextmanager
def _ended() -> Iterator[list[subprocess.Popen[bytes]]]:
    """None of these processes stays behind."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], outs: Sequence[Path]) -> None:
    """Until all have ended well. Raises RunFailed with the first one's last line that did not, or after LIMIT."""
    end = time.monotonic() + LIMIT
    while any(process.poll() is None for process in processes):
        failed = [process for process in processes if process.poll()]
        if failed or time.monotonic() > end:
            break
        time.sleep(0.05)
    for rank, (process, out) in enumerate(zip(processes, outs, strict=True)):
        if process.poll():
            said = out.with_suffix(".err").read_text().strip().splitlines()
            raise RunFailed(f"rank {rank}: {said[-1] if said else f'exit status {process.returncode}'}")
    if any(process.poll() is None for process in processes):
        raise RunFailed(f"not ended after {LIMIT:g} s")


def _core(rank: int) -> int | None:
    here = cores()
    return here[rank % len(here)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
