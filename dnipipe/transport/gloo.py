"""ZeroMQ for every message, in order; but the tensors of activations and gradients go by gloo, torch.distributed's own.

    stage k ── zmq: header of Activation 7 ────────────────► stage k+1 checks it, reserves memory, and asks for them
            ── gloo: its tensors, once they are asked for ─►
            ◄───────────────────── zmq: Received 7 ─────────            stage k lets go of them

An edge has two process groups of its two stages, one for each direction: no post meets one of the other direction. Four
things about gloo's sends and receives, as torch 2.13 has them, decide what is promised here:

  - nothing moves before the receiver has asked for it: a tensor is under way three times as long as over ZeroMQ, so
    on a link with a delay `zmq` is the transport to use;
  - a wait that reaches its limit breaks the connection, and nobody can ask whether a wait would be a short one: so
    `receive`, with a header in its hands, waits for that header's tensors up to the transport's own `timeout`, beyond
    its own limit and in spite of a `wake`; they are on their way by then, or their sender is dead, which ends the wait;
  - for the same reason a sender learns that its tensors have arrived by Received, of which `queue` may be lacking, and
    `close` waits until nothing is lacking (at most LINGER): what was sent arrives if the neighbour is receiving;
  - more bytes than were asked for end the receiving process at once. Only another version of this file could send them.

No authentication and no encryption (docs/security.md).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import zmq
from torch.distributed import DistError, PrefixStore, ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

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
INTERFACE = "GLOO_SOCKET_IFNAME"
BULKY = {kind.__name__ for kind in (Activation, Gradient)}


def choose_interface(machines: int, private: bool = False) -> None:
    """Make gloo listen on the loopback interface only, or on the one that the environment names.

    Raises ConfigError where stages are on several machines and it names none: gloo would go by the host's name; and for
    an interface that others reach, unless the network is private (security.private_network).
    """
    if INTERFACE not in os.environ and machines > 1:
        raise ConfigError(
            f"transport.kind = gloo on {machines} machines: set the environment variable {INTERFACE} on each to the "
            "interface that reaches the others, e.g. eth1; or use transport.kind = zmq"
        )
    os.environ.setdefault(INTERFACE, next(name for _, name in socket.if_nameindex() if name.startswith("lo")))
    if not os.environ[INTERFACE].startswith("lo"):
        check_reach(f"{INTERFACE}={os.environ[INTERFACE]}", private, cure="use transport.kind = zmq with security.keys")


class _Bulk:
    """The tensors of one edge. `under_way`: by message number, what the neighbour has not received."""

    def __init__(self, store: Store, rank: int, limit: timedelta) -> None:
        down, up = (ProcessGroupGloo(PrefixStore(way, store), rank, 2, limit) for way in ("down", "up"))
        self.out, self.into = (down, up) if rank == 0 else (up, down)
        self.peer, self.limit = 1 - rank, limit
        self.under_way: dict[int, list[Work]] = {}

    def post(self, seq: int, frames: Sequence[Frame]) -> None:
        tensors = [torch.frombuffer(frame, dtype=torch.uint8) for frame in frames if len(frame)]
        self.under_way[seq] = [self.out.send([tensor], self.peer, 0) for tensor in tensors]  # type: ignore[attr-defined]

    def get(self, sizes: Sequence[int]) -> list[Frame]:
        """Frames of so many bytes each, which the neighbour posted in this order. Raises RuntimeError."""
        tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        works = [self.into.recv([tensor], self.peer, 0) for tensor in tensors if len(tensor)]  # type: ignore[attr-defined]
        for work in works:
            work.wait(self.limit)
        return [tensor.numpy().data for tensor in tensors]

    def let_go(self, seq: int) -> None:
        """The neighbour has the tensors of this message."""
        for work in self.under_way.pop(seq, []):
            with contextlib.suppress(RuntimeError):  # it has it, and may be gone already
                work.wait(self.limit)


class GlooTransport(ZmqTransport):
    """One stage's end of its edges (see Transport, and above). Arguments are ZmqTransport's.

    Each edge, once it is open, is `join`ed by both of its stages.
    """

    def __init__(self, run: str, **options: Any) -> None:
        super().__init__(run, **options)
        self._bulk: dict[Edge, _Bulk] = {}

    def join(self, side: Side, store: Store) -> None:
        """Meet the neighbour on that side at a store which is this edge's alone. Raises WaitTimeout, PeerLost."""
        edge = self._edges[side]
        try:
            self._bulk[edge] = _Bulk(store, 0 if side is Side.NEXT else 1, timedelta(seconds=self.timeout))
        except DistError as error:
            raise WaitTimeout(
                f"waited {self.timeout:g} s (transport.timeout) for {edge.name} to join by gloo: {error}"
            ) from None
        except RuntimeError as error:
            raise PeerLost(f"cannot reach {edge.name} by gloo: {error}") from None

    # -- sending -----------------------------------------------------------------------------------------------

    def _hand_over(self, edge: Edge, frames: list[Frame], message: Message) -> None:
        if type(message).__name__ not in BULKY or not any(map(len, frames[1:])):
            super()._hand_over(edge, frames, message)
            return
        bulk = self._bulk[edge]
        if len(bulk.under_way) >= self.queue:
            self._wait_for_room(edge, lambda: self._settled(edge, self.queue - 1), zmq.POLLIN, message)
        super()._hand_over(edge, frames[:1], message)
        try:
            bulk.post(edge.sent, frames[1:])
        except RuntimeError as error:
            edge.lose(f"{edge.name} is gone: {error}")

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

    def _read(self, edge: Edge, header: Header, frames: Sequence[Frame]) -> Message | None:
        if header.type in BULKY and not frames and any(sizes := codec.sizes(header, self.max_message)):
            frames = self._tensors(edge, sizes)
            message = super()._read(edge, header, frames)
            with contextlib.suppress(PeerLost):  # this message came whole; the next call will tell
                self._put(edge, Received(header.seq))
            return message
        message = super()._read(edge, header, frames)
        if not isinstance(message, Received):
            return message
        self._bulk[edge].let_go(message.seq)
        return None

    def _tensors(self, edge: Edge, sizes: Sequence[int]) -> list[Frame]:
        started = time.monotonic()
        try:
            return self._bulk[edge].get(sizes)
        except RuntimeError as error:
            edge.torn = True
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
        for edge in self._bulk:
            with contextlib.suppress(DnipipeError):
                self._until(edge, partial(self._settled, edge, 0), zmq.POLLIN, deadline - time.monotonic())
        self._bulk.clear()
        super().close()
