"""ZeroMQ for every message, in order; but the tensors of activations and gradients go apart, by torch.distributed.

    stage k ── zmq: header of Activation 7 ──────────────► stage k+1 checks it, reserves memory, and asks for them
            ── gloo or nccl: its tensors, once asked for ─►
            ◄─────────────────── zmq: Received 7 ─────────            stage k lets go of them

An edge has two process groups of its two stages, one for each direction: no post meets one of the other direction.
Nothing moves before the receiver has asked for it: a tensor is under way three times as long as over ZeroMQ, so on a
link with a delay `zmq` is the transport to use. How much a sender may have under way, `queue` messages, and that it may
close, it learns by Received: `close` waits until nothing is lacking (at most LINGER), so what was sent arrives if the
neighbour is receiving. More bytes than were asked for can end the receiving process, or garble what follows; only
another version of this file could send them. No authentication and no encryption (docs/security.md).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import zmq
from torch import Tensor
from torch.distributed import DistError, PrefixStore, Store, Work  # type: ignore[attr-defined]

from dnipipe import codec
from dnipipe.codec import Frame, Header
from dnipipe.errors import ConfigError, DnipipeError, PeerLost, WaitTimeout
from dnipipe.messages import Activation, Gradient, Message, Received
from dnipipe.transport import Side
from dnipipe.transport.address import check_reach
from dnipipe.transport.edge import Edge
from dnipipe.transport.edges import LINGER
from dnipipe.transport.zmq import ZmqTransport

KEPT = 2048  # messages that a send may set aside while it waits for Received, which stands behind them
BULKY = {kind.__name__ for kind in (Activation, Gradient)}


Group = Callable[[Store, int, timedelta], Any]  # a store of its own, this end's rank, longest wait -> process group


class Bulk(ABC):
    """The tensors of one edge. `under_way`: by message number, what the neighbour has not received.

    Args:
        group: makes a process group of two.
        rank: 0 for the upper stage of the two.
        limit: longest wait for tensors.
    """

    def __init__(self, group: Group, store: Store, rank: int, limit: timedelta) -> None:
        down, up = (group(PrefixStore(way, store), rank, limit) for way in ("down", "up"))
        self.out, self.into = (down, up) if rank == 0 else (up, down)
        self.peer, self.limit = 1 - rank, limit
        self.under_way: dict[int, list[tuple[Work, Tensor]]] = {}

    @abstractmethod
    def raw(self, tensor: Tensor) -> Tensor:
        """Its bytes (n,) uint8, where the group sends from."""

    def post(self, seq: int, tensors: Sequence[Tensor]) -> None:
        """Raises RuntimeError."""
        self.under_way[seq] = [(self.out.send([tensor], self.peer, 0), tensor) for tensor in tensors if len(tensor)]

    @abstractmethod
    def get(self, sizes: Sequence[int], check: Callable[[], None]) -> list[Tensor]:
        """Tensors of so many bytes each, which the neighbour posted in this order. Raises RuntimeError.

        check: raises PeerLost if the neighbour is known to be gone.
        """

    @abstractmethod
    def let_go(self, seq: int) -> None:
        """The neighbour has the tensors of this message."""

    @abstractmethod
    def close(self) -> None: ...


class ApartTransport(ZmqTransport, ABC):
    """One stage's end of its edges (see Transport, and above). Arguments are ZmqTransport's.

    Each edge, once it is open, is `join`ed by both of its stages.
    """

    way: str  # what its errors call it

    def __init__(self, run: str, **options: Any) -> None:
        super().__init__(run, **options)
        self._bulk: dict[Edge, Bulk] = {}

    @abstractmethod
    def _bulk_of(self, store: Store, rank: int, limit: timedelta) -> Bulk:
        """One edge's. Raises DistError, RuntimeError."""

    def join(self, side: Side, store: Store) -> None:
        """Meet the neighbour on that side at a store which is this edge's alone. Raises WaitTimeout, PeerLost."""
        edge = self._edges[side]
        try:
            self._bulk[edge] = self._bulk_of(store, 0 if side is Side.NEXT else 1, timedelta(seconds=self.timeout))
        except DistError as error:
            raise WaitTimeout(
                f"waited {self.timeout:g} s (transport.timeout) for {edge.name} to join by {self.way}: {error}"
            ) from None
        except RuntimeError as error:
            raise PeerLost(f"cannot reach {edge.name} by {self.way}: {error}") from None

    # -- sending -----------------------------------------------------------------------------------------------

    def _put(self, edge: Edge, message: Message) -> None:
        if type(message).__name__ not in BULKY:
            super()._put(edge, message)
            return
        bulk = self._bulk[edge]
        with self.packing:
            header, tensors = codec.announce(message, edge.token, edge.sent)
            raw = [bulk.raw(tensor) for tensor in tensors]
        self._check_size(message, raw)
        if len(bulk.under_way) >= self.queue:
            self._wait_for_room(edge, lambda: self._settled(edge, self.queue - 1), zmq.POLLIN, message)
        self._hand_over(edge, [header], message)
        if any(map(len, raw)):
            try:
                bulk.post(edge.sent, raw)
            except RuntimeError as error:
                edge.lose(f"{edge.name} is gone: {error}")
        edge.count_sent(message)

    def _settled(self, edge: Edge, most: int) -> bool:
        """Whether at most so many messages lack their Received, as far as is known. Keeps what else has come."""
        bulk = self._bulk[edge]
        while len(bulk.under_way) > most and len(edge.kept) < KEPT and (got := self._fetch(edge)):
            if got[0].type == Received.__name__:
                self._read(edge, *got)
            else:
                edge.kept.append(got)
        return len(bulk.under_way) <= most

    # -- receiving ---------------------------------------------------------------------------------------------

    def _read(self, edge: Edge, header: Header, frames: Sequence[Frame | Tensor]) -> Message | None:
        if header.type in BULKY and not frames and (sizes := codec.sizes(header, self.max_message)):
            tensors = self._tensors(edge, sizes)
            message = super()._read(edge, header, tensors)
            if any(sizes):
                with contextlib.suppress(PeerLost):  # this message came whole; the next call will tell
                    self._put(edge, Received(header.seq))
            return message
        message = super()._read(edge, header, frames)
        if not isinstance(message, Received):
            return message
        self._bulk[edge].let_go(message.seq)
        return None

    def _tensors(self, edge: Edge, sizes: Sequence[int]) -> list[Tensor]:
        started = time.monotonic()

        def check() -> None:
            edge.watch_now_and_then()
            edge.check()

        try:
            return self._bulk[edge].get(sizes, check)
        except RuntimeError as error:
            edge.torn = True
            if isinstance(error, PeerLost):
                raise
            waited = time.monotonic() - started
            if waited > self.timeout - 0.01:  # seconds; gloo counts milliseconds
                raise WaitTimeout(
                    f"waited {waited:.0f} s (transport.timeout) for {sum(sizes)} bytes that {edge.name} announced; "
                    f"{edge.history()}"
                ) from None
            edge.lose(f"{edge.name} is gone: its process ended, or the connection broke ({error})")

    # -- ending ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Also waits, for the same LINGER seconds, until the neighbours have received what was sent."""
        deadline = time.monotonic() + LINGER
        for edge, bulk in self._bulk.items():
            with contextlib.suppress(DnipipeError):
                self._until(edge, partial(self._settled, edge, 0), zmq.POLLIN, deadline - time.monotonic())
            bulk.close()
        self._bulk.clear()
        super().close()


def bytes_of(tensor: Tensor) -> Tensor:
    """(n,) uint8, the same memory if the tensor is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def choose_interface(variable: str, kind: str, machines: int, private: bool = False) -> None:
    """Make a library listen on the loopback interface only, or on the one that its environment variable names.

    Raises ConfigError where stages are on several machines and it names none: it would go by the host's name; and for
    an interface that others reach, unless the network is private (security.private_network).
    """
    if variable not in os.environ and machines > 1:
        raise ConfigError(
            f"transport.kind = {kind} on {machines} machines: set the environment variable {variable} on each to the "
            "interface that reaches the others, e.g. eth1; or use transport.kind = zmq"
        )
    os.environ.setdefault(variable, next(name for _, name in socket.if_nameindex() if name.startswith("lo")))
    if not os.environ[variable].startswith("lo"):
        check_reach(f"{variable}={os.environ[variable]}", private, cure="use transport.kind = zmq with security.keys")


__all__ = ["ApartTransport", "Bulk", "Group", "bytes_of", "choose_interface"]
