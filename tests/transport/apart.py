"""A transport in a process of its own, for those that cannot have both ends in one: NCCL wants a process an end.

test ── send, receive, close ──► Remote ── pipe ──► process: NcclTransport ◄── NCCL ──► another such process
     ── wake ──► ...           ── pipe ──► ... its own thread, since a receive may be waiting
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore

from dnipipe.beside import Beside
from dnipipe.messages import Message
from dnipipe.transport import AT_EASE, Side, line
from dnipipe.transport.apart import ApartTransport
from dnipipe.transport.nccl import NcclTransport

LIMIT = 60.0  # seconds for any answer; only a failing test waits so long
Make = Callable[..., ApartTransport]  # called with NcclTransport's arguments but `lines`, and the end's number


def nccl(end: int, **options: Any) -> ApartTransport:
    """Ends share a GPU if there are too few. NCCL refuses that of one host, so then each says that it is another."""
    gpus = torch.cuda.device_count()
    if gpus < 3:
        os.environ["NCCL_HOSTID"] = f"host-{end}"
    device = torch.device("cuda", end % gpus)
    torch.cuda.set_device(device)
    return NcclTransport("run", lines=Beside(device), **options)


class Host:
    """A process that makes transports, one after another; starting it takes seconds."""

    def __init__(self, end: int, make: Make) -> None:
        context = get_context("spawn")
        self.calls, calls = context.Pipe()
        self.wakes, wakes = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, make, calls, wakes), daemon=True)
        self.process.start()
        self.lock = threading.Lock()

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            self.calls.send_bytes(pickle.dumps((name, arguments, options)))
            if not self.calls.poll(LIMIT):
                self.process.kill()
                raise AssertionError(f"{name} did not end within {LIMIT:g} s")
            ok, value = pickle.loads(self.calls.recv_bytes())
        if not ok:
            raise value
        return value

    def end(self) -> None:
        self.process.kill()
        self.process.join()


class Remote:
    """The transport of a Host (see Transport)."""

    def __init__(self, host: Host, **options: Any) -> None:
        self.host = host
        host.call("make", **options)

    def send(self, side: Side, message: Message) -> None:
        self.host.call("send", side, message)

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        found: tuple[Side, Message] | None = self.host.call("receive", list(sides), timeout)
        return found

    def wake(self) -> None:
        self.host.wakes.send_bytes(b"")

    def close(self) -> None:
        self.host.call("close")


def _serve(end: int, make: Make, calls: Connection, wakes: Connection) -> None:
    torch.set_num_threads(1)
    line.GRACE["tcp"] = 0.2
    transport: ApartTransport | None = None

    def waking() -> None:
        while True:
            wakes.recv_bytes()
            if transport is not None:
                transport.wake()

    threading.Thread(target=waking, daemon=True).start()
    while True:
        name, arguments, options = pickle.loads(calls.recv_bytes())
        faulthandler.dump_traceback_later(LIMIT / 2)  # where it hangs, if it does
        try:
            value = None
            if name == "make":
                transport = make(end, **options)
            elif name == "join":
                side, path = arguments
                assert transport is not None
                transport.join(side, FileStore(str(path), 2))
            else:
                value = getattr(transport, name)(*arguments, **options)
                if name == "receive" and value is not None:
                    value = value[0], _here(value[1])
            faulthandler.cancel_dump_traceback_later()
            calls.send_bytes(pickle.dumps((True, value)))
        except BaseException as error:
            calls.send_bytes(pickle.dumps((False, error)))


def _here(message: Message) -> Message:
    moved: dict[str, Any] = {}
    for field in fields(message):
        value = getattr(message, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.cpu()
    return replace(message, **moved)


def chain(hosts: Sequence[Host], folder: Path, stores: Path, capacity: int, timeout: float) -> list[Remote]:
    """Connected and joined, as many as there are hosts. What is in `stores` is needed until they are closed."""
    options = {"queue": capacity, "timeout": timeout, "max_message": 2**26, "names": {Side.NEXT: "stage n"}}
    made = [Remote(host, **options) for host in hosts]
    for k, (before, after) in enumerate(itertools.pairwise(hosts)):
        after.call("connect", before.call("listen", f"ipc://{folder}/{k}"))
        store = stores / f"store-{k}"
        joining = threading.Thread(target=before.call, args=("join", Side.NEXT, store))
        joining.start()
        after.call("join", Side.PREVIOUS, store)
        joining.join()
    return made
