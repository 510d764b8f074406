"""The tensors of training by NCCL, from one GPU's memory to another's (apart.py).

What NCCL does on the GPU it does in kernels, which spin there until the other end has come; so

  - an edge's two directions have a group, and with it a stream, each, and none of them is the stage's own: a receive
    waits for nothing that the stage computes, and a send only for what was given to the GPU before it;
  - a sender announces its tensors when they are made, and not before (StagedTransport holds them back), so a receiver,
    which then waits for them, waits for the way alone;
  - a thread of its own waits for a kernel to end, so that who wants the tensors can look meanwhile whether their sender
    is still there; the kernels that wait for one that is gone are told to give up (`abort`) when the edge is closed.
    torch's own watchdog, which would end the process instead, is told not to.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, Work  # type: ignore[attr-defined]

from dnipipe.beside import Beside, Done
from dnipipe.errors import ConfigError
from dnipipe.transport.apart import ApartTransport, Bulk, Group, bytes_of
from dnipipe.transport.edges import LINGER

INTERFACE = "NCCL_SOCKET_IFNAME"
WATCHDOG = timedelta(days=365)  # after which torch would end the process
LOOK_EVERY = 0.02  # seconds between two looks whether the neighbour is still there


def check_nccl(device: torch.device) -> None:
    """Raises ConfigError where NCCL cannot be used."""
    if device.type != "cuda" or not dist.is_nccl_available():
        why = f"pipeline.device is {device.type}" if device.type != "cuda" else "this torch has none"
        raise ConfigError(f"transport.kind = nccl needs a GPU for each stage, and {why}: use transport.kind = zmq")


class NcclBulk(Bulk):
    """Args: as Bulk's. group: of two ends that both have a device; what is not NCCL's may stand in for it."""

    def __init__(
        self,
        group: Group,
        store: Store,
        rank: int,
        limit: timedelta,
        lines: Beside,
    ) -> None:
        super().__init__(group, store, rank, limit)
        self.lines = lines
        self._meet(store, rank)

    def _meet(self, store: Store, rank: int) -> None:
        """One byte each way. Groups connect at their first use, and then wait for one another without a limit: so not
        before both ends are there. Raises DistError if the other end does not come."""
        store.set(f"end {rank}", "is there")
        store.wait([f"end {self.peer}"], self.limit)
        byte = torch.zeros(1, dtype=torch.uint8, device=self.lines.device)
        down, up = (self.out.send, self.into.recv) if rank == 0 else (self.into.recv, self.out.send)
        for call in (down, up):
            self._wait([call([byte], self.peer, 0)], lambda: None)

    def raw(self, tensor: Tensor) -> Tensor:
        return bytes_of(tensor.to(self.lines.device))

    def get(self, sizes: Sequence[int], check: Callable[[], None]) -> list[Tensor]:
        with self.lines:  # so that it need not wait for what is computed
            tensors = [torch.empty(size, dtype=torch.uint8, device=self.lines.device) for size in sizes]
            works = [self.into.recv([tensor], self.peer, 0) for tensor in tensors if len(tensor)]
            self._wait(works, check)
        return [self.lines.for_compute(tensor) for tensor in tensors]

    def _wait(self, works: Sequence[Work], check: Callable[[], None]) -> None:
        """Until all are done, for the host too. Raises RuntimeError at the limit, or if one failed."""
        for work in works:
            work.wait()  # of NCCL: makes the current stream wait
        ended = _ended(self.lines.mark(taken=False))
        deadline = time.monotonic() + self.limit.total_seconds()
        while True:
            try:
                ended.result(LOOK_EVERY)
                return
            except TimeoutError:
                check()
                if time.monotonic() > deadline:
                    raise RuntimeError("the limit is over") from None

    def let_go(self, seq: int) -> None:
        self.under_way.pop(seq, None)

    def close(self) -> None:
        """The same direction first at both ends, for an abort may wait for the other end's; and not for ever."""
        both = (self.out, self.into) if self.peer == 1 else (self.into, self.out)
        ending = threading.Thread(target=lambda: [group.abort() for group in both], daemon=True)
        ending.start()
        ending.join(LINGER)


def _ended(done: Done) -> Future[bool]:
    """`done(True)` in a thread that keeps no process from ending: a kernel whose other end is gone may never do so."""
    ended: Future[bool] = Future()

    def wait() -> None:
        try:
            ended.set_result(done(True))
        except BaseException as error:
            ended.set_exception(error)

    if done(False):
        ended.set_result(True)
    else:
        threading.Thread(target=wait, name="nccl", daemon=True).start()
    return ended


class NcclTransport(ApartTransport):
    """One stage's end of its edges (see ApartTransport).

    Args:
        lines: of the stage's GPU. The others are ApartTransport's.
    """

    way = "nccl"

    def __init__(self, run: str, *, lines: Beside, **options: Any) -> None:
        super().__init__(run, **options)
        self.lines = lines

    def _bulk_of(self, store: Store, rank: int, limit: timedelta) -> Bulk:
        with torch.cuda.device(self.lines.device):
            return NcclBulk(_group, store, rank, limit, self.lines)


def _group(store: Store, rank: int, _: timedelta) -> Any:
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # a neighbour that is gone is an error here, not the end
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"  # it asks the store, which may be gone before this process is
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = WATCHDOG  # not `limit`: a send that nobody asks for yet is no failure, and the wait has its own
    return dist.ProcessGroupNCCL(store, rank, 2, options)


__all__ = ["INTERFACE", "NcclTransport", "check_nccl"]
