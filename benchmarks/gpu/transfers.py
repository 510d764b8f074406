"""How fast tensors get from one stage's GPU to another's, and the copies that this is made of.

process 0, GPU ── down ──► pinned ── transport ──► main memory ── pinned, up ──► GPU, process 1
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from dnipipe.beside import Beside
from dnipipe.errors import PeerLost
from dnipipe.messages import Activation, Gradient
from dnipipe.staging import StagedTransport
from dnipipe.transport import Side
from dnipipe.transport.apart import ApartTransport, choose_interface
from dnipipe.transport.nccl import INTERFACE, NcclTransport
from dnipipe.transport.zmq import ZmqTransport

MIB = (1, 4, 16, 64)  # of a tensor
AHEAD = 4  # tensors under way
COUNT = 60  # of a measurement
LIMIT = 120.0  # seconds


def copies(repeats: int) -> Iterator[tuple[str, list[float]]]:
    """GB/s of the bare copies, by size."""
    for way, up, pin in (("to", True, False), ("to", True, True), ("from", False, False), ("from", False, True)):
        rates = []
        for size in MIB:
            host = torch.zeros(size * 2**20, dtype=torch.uint8, pin_memory=pin)
            here = torch.zeros(size * 2**20, dtype=torch.uint8, device="cuda")
            source, target = (host, here) if up else (here, host)
            rates.append(median([_timed(source, target) for _ in range(1 + repeats)][1:]))
        yield f"copy {way} a GPU, {'pinned' if pin else 'pageable'}", rates


def _timed(source: Tensor, target: Tensor) -> float:
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(COUNT):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return COUNT * len(source) / (time.monotonic() - began) / 1e9


def sent(repeats: int) -> Iterator[tuple[str, list[float]]]:
    """GB/s from a GPU to another's, or to the same one's where there is one, between two processes, by size."""
    ways = {"zmq over ipc": ("zmq", "ipc"), "zmq over tcp": ("zmq", "tcp")}
    if torch.cuda.device_count() > 1:
        ways["nccl"] = ("nccl", "ipc")
    for name, way in ways.items():
        yield f"from GPU to GPU, {name}", _between(*way, repeats)


def _between(kind: str, scheme: str, repeats: int) -> list[float]:
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ends, theirs = zip(*(context.Pipe() for _ in range(2)), strict=True)
        both = [
            context.Process(target=_end, args=(rank, kind, scheme, folder, repeats, theirs[rank]), daemon=True)
            for rank in range(2)
        ]
        try:
            for process in both:
                process.start()
            ends[1].send(_heard(ends[0], kind))
            rates: list[float] = _heard(ends[0], kind)
            _heard(ends[1], kind)
            return rates
        finally:
            for process in both:
                process.kill()
                process.join()


def _heard(end: Connection, kind: str) -> list[float]:
    if not end.poll(LIMIT):
        raise SystemExit(f"{kind}: nothing heard for {LIMIT:g} s")
    value: list[float] = end.recv()
    return value


def _end(rank: int, kind: str, scheme: str, folder: str, repeats: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    lines = Beside(device)
    options: dict[str, Any] = {"queue": 64, "timeout": LIMIT, "max_message": 2**28}
    if kind == "nccl":
        choose_interface(INTERFACE, kind, machines=1)
    transport = NcclTransport("run", lines=lines, **options) if kind == "nccl" else ZmqTransport("run", **options)
    if rank == 0:
        pipe.send(transport.listen("tcp://127.0.0.1:*" if scheme == "tcp" else f"ipc://{folder}/edge"))
    else:
        transport.connect(pipe.recv())
    side = Side.PREVIOUS if rank else Side.NEXT
    if isinstance(transport, ApartTransport):
        transport.join(side, FileStore(str(Path(folder) / "store"), 2))
    staged = StagedTransport(transport, lines, direct=kind == "nccl")
    if rank == 0:
        pipe.send([median([_rate(staged, size, device) for _ in range(1 + repeats)][1:]) for size in MIB])
    else:
        for _ in range(len(MIB) * (1 + repeats) * COUNT):
            _answer(staged, lines)
        pipe.send([])
        with contextlib.suppress(PeerLost):  # the last answer is out when the other end is gone
            staged.receive([side], 5.0)
    transport.close()


def _rate(staged: StagedTransport, size: int, device: torch.device) -> float:
    x, y = torch.zeros(size * 2**18, device=device), torch.zeros(1, device=device)
    began, answered = time.monotonic(), 0
    for batch in range(COUNT):
        staged.send(Side.NEXT, Activation(batch, x, y))
        while batch - answered >= AHEAD:
            answered += _took(staged)
    while answered < COUNT:
        answered += _took(staged)
    return COUNT * size * 2**20 / (time.monotonic() - began) / 1e9


def _took(staged: StagedTransport) -> int:
    if staged.receive([Side.NEXT], LIMIT) is None:
        raise SystemExit("no answer")
    return 1


def _answer(staged: StagedTransport, lines: Beside) -> None:
    got = staged.receive([Side.PREVIOUS], LIMIT)
    assert got is not None and isinstance(got[1], Activation)
    x: Tensor = lines.bring(got[1].x)
    with lines:
        assert bool(torch.isfinite(x[:1]).all())  # as a stage does: it is there
    staged.send(Side.PREVIOUS, Gradient(got[1].batch, None))


__all__ = ["MIB", "copies", "sent"]
