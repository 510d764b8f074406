"""Stages in different processes or on different machines, over ZeroMQ: ipc (socket files) and tcp.

    stage k ── DEALER, binds ◄────── edge ──────► DEALER, connects ── stage k+1        one pair of sockets an edge

ZeroMQ keeps order but not every message: what is under way when a connection breaks is lost without a word. So each
message carries the run's token (another run's is dropped and counted) and its number on this edge (a gap is PeerLost),
and a monitor on each socket tells when a connection ends. A stage that only hangs still looks alive here: that the
worker sees, by its own limits. One thread owns a transport; only `wake` may be called from elsewhere.

What was sent before an orderly close arrives if the neighbour's queue has room for it; libzmq drops what still lies in
the kernel's buffers when a connection ends while the queue is full. So a stage closes once all it sent is answered.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import zmq

from dnipipe import codec
from dnipipe.codec import Frame, Header
from dnipipe.errors import ConfigError, MessageError, WaitTimeout
from dnipipe.messages import Message
from dnipipe.transport import AT_EASE, Side
from dnipipe.transport.edge import Edge, check_address

LINGER = 5.0  # seconds in which close() delivers what was sent


class ZmqTransport:
    """One stage's end of its edges (see Transport).

    Args:
        run: the run's token; messages that carry another are dropped.
        queue: messages that may wait at each end of an edge, in each direction.
        timeout: seconds that `send` waits for room.
        max_message: largest tensor, bytes.
        names: what errors call the neighbours, e.g. {Side.NEXT: "stage 2"}.
        packing, full: within these a message is written and read as frames, and `send` waits for room, so that its
            owner can tell one from the other.
    """

    def __init__(
        self,
        run: str,
        *,
        queue: int,
        timeout: float,
        max_message: int,
        names: Mapping[Side, str] | None = None,
        packing: AbstractContextManager[object] = AT_EASE,
        full: AbstractContextManager[object] = AT_EASE,
    ) -> None:
        self.run, self.queue, self.timeout, self.max_message = run, queue, timeout, max_message
        self.names = {side: f"the {side.value} stage" for side in Side} | dict(names or {})
        self.packing, self.full = packing, full
        self.dropped: Counter[str] = Counter()  # messages thrown away, by reason
        self._context = zmq.Context(io_threads=1)  # 1: one feeds 2 GB/s and more
        self._context.set(zmq.MAX_SOCKETS, 16)  # two sockets, two monitors with two ends each, and the library's own
        self._edges: dict[Side, Edge] = {}
        self._pollers: dict[tuple[Side, ...], zmq.Poller] = {}  # made once: receive is called for every message
        self._alarm = False
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)
        self._closed = False

    # -- connecting --------------------------------------------------------------------------------------------

    def listen(self, address: str) -> str:
        """Open the edge to the next stage, "tcp://127.0.0.1:*" or "ipc:///folder/file"; returns its exact endpoint.

        Raises ConfigError for an address that cannot be had, or that would let in other machines unasked.
        """
        check_address(address)
        file = Path(address.removeprefix("ipc://")) if address.startswith("ipc://") else None
        if file and file.exists():  # zmq would take it from whoever listens there
            raise ConfigError(f"cannot listen on {address}: the file exists already; choose another, or remove it")
        edge = self._open(Side.NEXT, address)
        try:
            edge.socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {address}: {error.strerror}; choose another address") from None
        edge.endpoint, edge.file = edge.socket.get_string(zmq.LAST_ENDPOINT), file
        return edge.endpoint

    def connect(self, endpoint: str) -> None:
        """Open the edge to the previous stage, at what its `listen` returned. It need not be there yet."""
        check_address(endpoint)
        try:
            self._open(Side.PREVIOUS, endpoint).socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot connect to {endpoint}: {error.strerror}") from None

    def _open(self, side: Side, address: str) -> Edge:
        if side in self._edges:
            raise ValueError(f"the edge to {self.names[side]} is open already")
        edge = Edge(self._context, self.names[side], address, self.queue, self.max_message, LINGER)
        edge.token = self.run
        self._edges[side] = edge
        self._pollers.clear()  # they knew one monitor less
        return edge

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, side: Side, message: Message) -> None:
        """Raises PeerLost if that side is gone, WaitTimeout if its queue stays full, MessageError if too large."""
        edge = self._edges[side]
        edge.watch_now_and_then()
        edge.check()
        self._put(edge, message)

    def _put(self, edge: Edge, message: Message) -> None:
        with self.packing:
            frames = codec.encode(message, edge.token, edge.sent)
        largest = max(map(len, frames[1:]), default=0)
        if largest > self.max_message:
            raise MessageError(
                f"a {type(message).__name__} holds a tensor of {largest} bytes, the limit is {self.max_message}: "
                "raise transport.max_message"
            )
        self._hand_over(edge, frames, message)
        edge.count_sent(message)

    def _hand_over(self, edge: Edge, frames: list[Frame], message: Message) -> None:
        """Message number `edge.sent`, as frames."""
        if not edge.put(frames):
            self._wait_for_room(edge, lambda: edge.put(frames), zmq.POLLOUT, message)

    def _wait_for_room(self, edge: Edge, room: Callable[[], bool], event: int, message: Message) -> None:
        if not self._until(edge, room, event, self.timeout):
            raise WaitTimeout(
                f"waited {self.timeout:g} s (transport.timeout) to send a {type(message).__name__} of batch "
                f"{getattr(message, 'batch', None)} to {edge.name}, which takes nothing more; {edge.history()}"
            )

    def _until(self, edge: Edge, done: Callable[[], bool], event: int, seconds: float) -> bool:
        """Wait until `done`, asked again at each event of the edge's socket. False at the limit. Raises PeerLost."""
        deadline = time.monotonic() + seconds
        poller = zmq.Poller()
        poller.register(edge.socket, event)
        for each in self._edges.values():
            poller.register(each.monitor, zmq.POLLIN)
        while not done():
            for each in self._edges.values():
                each.watch()
            edge.check()
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with self.full:
                self._poll(poller, [edge], left)
        return True

    # -- receiving ---------------------------------------------------------------------------------------------

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        """The next message, None after `timeout` or a wake. Raises PeerLost after a lost side's last message.

        Raises MessageError for what is no message, and PeerLost if messages before this one are missing.
        """
        edges = [self._edges[side] for side in sides]
        poller = self._poller(sides)
        ready = dict(poller.poll(0))  # one call into zmq asks all sockets and monitors
        deadline = None
        while not self._was_woken():
            for side, edge in zip(sides, edges, strict=True):
                message = self._take(edge) if edge.kept or edge.socket in ready else None
                if message is not None:
                    return side, message
            for edge in self._edges.values():
                if edge.monitor in ready:
                    edge.watch()
            if not self._sound(edges):  # after _take: what came before the end has been handed out
                break
            deadline = deadline or time.monotonic() + timeout  # what is there already needs none
            left = deadline - time.monotonic()
            if left <= 0:
                break
            with waiting:
                ready = self._poll(poller, edges, left)
        return None

    def _sound(self, edges: Sequence[Edge]) -> bool:
        """Whether there is anything to wait for. Raises PeerLost."""
        for edge in edges:
            edge.check()
        return True

    def _take(self, edge: Edge) -> Message | None:
        """A message that is there already."""
        while got := edge.kept.popleft() if edge.kept else self._fetch(edge):
            message = self._read(edge, *got)
            if message is not None:
                return message
        return None

    def _fetch(self, edge: Edge) -> tuple[Header, list[Frame]] | None:
        """Header and tensors' frames of the next message in order, if this run's is there."""
        while not edge.torn and (frames := edge.get()):
            with self.packing:
                header = codec.read_header(frames[0].buffer)
            if header.run != edge.token:
                self.dropped["another run"] += 1
                continue
            edge.check_order(header.seq)
            return header, [frame.buffer for frame in frames[1:]]
        return None

    def _read(self, edge: Edge, header: Header, frames: Sequence[Frame]) -> Message | None:
        """None: it was for the transport itself."""
        with self.packing:
            message = codec.read_body(header, frames, self.max_message)
        edge.count_received(message)
        return message

    # -- waiting -----------------------------------------------------------------------------------------------

    def _poll(self, poller: zmq.Poller, edges: Iterable[Edge], seconds: float) -> dict[Any, int]:
        """Sleep until something wanted, or an event of a connection, or a lost edge's grace is over, or the limit.

        Returns what is ready, sockets as they were registered.
        """
        now = time.monotonic()
        ends = [edge.deadline - now for edge in edges if edge.deadline is not None]
        return dict(poller.poll(math.ceil(1000 * max(0.0, min([seconds, *ends])))))

    def _poller(self, sides: Sequence[Side]) -> zmq.Poller:
        """Wakes for messages from `sides`, for what the monitors tell, and for `wake`."""
        key = tuple(sides)
        if key not in self._pollers:
            poller = self._pollers[key] = zmq.Poller()
            for side in sides:
                poller.register(self._edges[side].socket, zmq.POLLIN)
            for edge in self._edges.values():
                poller.register(edge.monitor, zmq.POLLIN)
            poller.register(self._woken, zmq.POLLIN)
        return self._pollers[key]

    def _was_woken(self) -> bool:
        if not self._alarm:
            return False
        self._alarm = False
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)
        return True

    def wake(self) -> None:
        """Make a `receive` that waits, or the next one, return None at once. Safe in a signal handler."""
        self._alarm = True
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody waits
            os.write(self._wake, b"\0")

    # -- ending ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Deliver what was sent, for at most LINGER seconds, then let go of every socket and file."""
        if self._closed:
            return
        self._closed = True
        woken, wake, self._woken, self._wake = self._woken, self._wake, -1, -1  # a late wake must hit no other file
        os.close(woken)
        os.close(wake)
        for edge in self._edges.values():
            edge.close()
        self._context.term()
        for edge in self._edges.values():
            if edge.file:
                edge.file.unlink(missing_ok=True)
