"""The tensors of training by gloo, torch.distributed's own, from main memory to main memory (apart.py).

Two things about gloo's sends and receives, as torch 2.13 has them, decide what is promised here:

  - a wait that reaches its limit breaks the connection, and nobody can ask whether a wait would be a short one: so
    `receive`, with a header in its hands, waits for that header's tensors up to the transport's own `timeout`, beyond
    its own limit and in spite of a `wake`; they are on their way by then, or their sender is dead, which ends the wait;
  - more bytes than were asked for end the receiving process at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from dnipipe.transport.apart import ApartTransport, Bulk, bytes_of

INTERFACE = "GLOO_SOCKET_IFNAME"


class GlooBulk(Bulk):
    def __init__(self, store: Store, rank: int, limit: timedelta) -> None:
        super().__init__(lambda store, rank, limit: ProcessGroupGloo(store, rank, 2, limit), store, rank, limit)

    def raw(self, tensor: Tensor) -> Tensor:
        return bytes_of(tensor.cpu())

    def get(self, sizes: Sequence[int], check: Callable[[], None]) -> list[Tensor]:
        tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        works = [self.into.recv([tensor], self.peer, 0) for tensor in tensors if len(tensor)]
        for work in works:
            work.wait(self.limit)
        return tensors

    def let_go(self, seq: int) -> None:
        for work, _ in self.under_way.pop(seq, []):
            with contextlib.suppress(RuntimeError):  # it has it, and may be gone already
                work.wait(self.limit)

    def close(self) -> None:
        """gloo closes a connection when nothing refers to its group."""
        del self.out, self.into


class GlooTransport(ApartTransport):
    """One stage's end of its edges (see ApartTransport)."""

    way = "gloo"

    def _bulk_of(self, store: Store, rank: int, limit: timedelta) -> Bulk:
        return GlooBulk(store, rank, limit)


__all__ = ["INTERFACE", "GlooTransport"]
