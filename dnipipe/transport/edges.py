"""The sockets of one stage: how they are opened, who may be at their other ends, and how they are closed.

listen ──► the edge to the next stage, which connects          connect ──► the edge to the stage before
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import zmq

from dnipipe.errors import ConfigError
from dnipipe.keys import KeyRing
from dnipipe.transport import Side
from dnipipe.transport.address import check_address, check_reach
from dnipipe.transport.curve import Doorkeeper, Lock
from dnipipe.transport.dropped import Dropped
from dnipipe.transport.edge import Edge

LINGER = 5.0  # seconds in which close() delivers what was sent


class Edges:
    """At most two edges, in a context of their own.

    Args:
        queue: messages that may wait at each end of an edge, in each direction.
        max_message: largest tensor, bytes.
        names: what errors call the neighbours, e.g. {Side.NEXT: "stage 2"}.
        ring: this stage's keys; None: connections are neither authenticated nor encrypted.
        spare: gradients that may wait for room on their way up, while the stage goes on (Backlog); 0: who sends waits.
    """

    def __init__(
        self,
        *,
        queue: int,
        max_message: int,
        names: Mapping[Side, str] | None = None,
        ring: KeyRing | None = None,
        spare: int = 0,
    ) -> None:
        self.queue, self.max_message, self.ring, self.spare = queue, max_message, ring, spare
        self.names = {side: f"the {side.value} stage" for side in Side} | dict(names or {})
        self.dropped = Dropped()
        self._context = zmq.Context(io_threads=2)  # a thread an edge (line.py); one feeds 2 GB/s and more
        self._context.set(zmq.MAX_SOCKETS, 32)  # two sockets, two monitors with two ends each, the doorkeeper's three
        self._doorkeeper = Doorkeeper(self._context, ring, self.dropped) if ring else None
        self._edges: dict[Side, Edge] = {}

    def listen(self, address: str, private: bool = False) -> str:
        """Open the edge to the next stage, "tcp://127.0.0.1:*" or "ipc:///folder/file"; returns its exact endpoint.

        Raises ConfigError for an address that cannot be had, or, without keys, one that others reach, unless the
        network is `private`.
        """
        check_address(address)
        file = Path(address.removeprefix("ipc://")) if address.startswith("ipc://") else None
        if file and file.exists():  # zmq would take it from whoever listens there
            raise ConfigError(f"cannot listen on {address}: the file exists already; choose another, or remove it")
        if self.ring is None:
            check_reach(address, private)
        edge = self._open(Side.NEXT, address)
        try:
            edge.bind()
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {address}: {error.strerror}; choose another address") from None
        return edge.endpoint

    def connect(self, endpoint: str) -> None:
        """Open the edge to the previous stage, at what its `listen` returned. It need not be there yet."""
        check_address(endpoint, listens=False)  # whose name is not looked up here: that may take long
        try:
            self._open(Side.PREVIOUS, endpoint).dial()
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot connect to {endpoint}: {error.strerror}") from None

    def _open(self, side: Side, address: str) -> Edge:
        if side in self._edges:
            raise ValueError(f"the edge to {self.names[side]} is open already")
        lock, ring = None, self.ring
        if ring:
            lock = Lock(ring, ring.stage + (1 if side is Side.NEXT else -1), side is Side.NEXT)
            lock.check()
        edge = Edge(
            self._context,
            self.names[side],
            address,
            self.queue,
            self.max_message,
            LINGER,
            side=side,
            lock=lock,
            dropped=self.dropped,
            spare=self.spare if side is Side.PREVIOUS else 0,
        )
        self._edges[side] = edge
        return edge

    def close(self) -> None:
        """Let go of every socket and file, once what was sent is delivered, within LINGER seconds."""
        for edge in self._edges.values():
            if edge.file:
                edge.file.remove()
            edge.close()
        if self._doorkeeper:
            self._doorkeeper.close()
        self._context.term()


__all__ = ["LINGER", "Edges"]
