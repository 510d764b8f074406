"""Stages in different processes or on different machines, over ZeroMQ: ipc (socket files) and tcp.

    stage k ── DEALER, binds ◄────── edge ──────► DEALER, connects ── stage k+1        one pair of sockets an edge

ZeroMQ keeps order but not every message: what is under way when a connection breaks is lost without a word. So each
message carries the run's token and its number on this edge (a gap is PeerLost), and a monitor on each socket tells when
a connection ends. A stage that only hangs still looks alive here: that the worker sees, by its own limits. One thread
owns a transport; only `wake` may be called from elsewhere.

What is no message of this run, or not one that was agreed on, is dropped and counted, and does not take its number: if
it was the neighbour's, the next one shows the gap; if it was a stranger's, nothing is missing. With a ring of keys
there are no strangers (curve.py).

What was sent before an orderly close arrives if the neighbour's queue has room for it; libzmq drops what still lies in
the kernel's buffers when a connection ends while the queue is full. So a stage closes once all it sent is answered.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import zmq
from torch import Tensor

from dnipipe import codec
from dnipipe.codec import Frame, Header
from dnipipe.errors import MessageError, PeerLost, WaitTimeout
from dnipipe.messages import Message
from dnipipe.transport import AT_EASE, Side
from dnipipe.transport.edge import Edge
from dnipipe.transport.edges import LINGER, Edges
from dnipipe.transport.limits import STILL
from dnipipe.transport.waker import Waker

BAD_LIMIT = 100  # messages in a row that are none, after which their sender is given up
LOOK_EVERY = 1.0  # seconds, at most, that a wait lasts without a look for revoked keys, and at what is on its way

Fits = Callable[[Side, Message], None]  # raises MessageError


class ZmqTransport(Edges):
    """One stage's end of its edges (see Transport).

    Args:
        run: the run's token; messages that carry another are dropped.
        timeout: seconds that `send` waits for room.
        fits: raises MessageError for a message that is not as this side's edge agreed; such are dropped.
        options: of Edges.
        packing, full: within these a message is written and read as frames, and `send` waits for room, so that its
            owner can tell one from the other.
    """

    def __init__(
        self,
        run: str,
        *,
        timeout: float,
        fits: Fits = lambda side, message: None,
        packing: AbstractContextManager[object] = AT_EASE,
        full: AbstractContextManager[object] = AT_EASE,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.run, self.timeout, self.fits = run, timeout, fits
        self.packing, self.full = packing, full
        self._pollers: dict[tuple[Side | None, ...], zmq.Poller] = {}  # made once: receive is called for every message
        self._waker = Waker()
        self._closed = False

    def _open(self, side: Side, address: str) -> Edge:
        edge = super()._open(side, address)
        edge.token = self.run
        self._pollers.clear()  # they knew one monitor less
        return edge

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, side: Side, message: Message) -> None:
        """Raises PeerLost if that side is gone, WaitTimeout if its queue stays full, MessageError if too large."""
        edge = self._edges[side]
        edge.watch_now_and_then()
        self._check(edge)
        self._submit(edge, message)

    def _submit(self, edge: Edge, message: Message) -> None:
        """To the socket, or to what waits for it; then only the queue's limit is waited for."""
        if edge.backlog is None:
            self._put(edge, message)
            return
        edge.backlog.append(message)
        if not self._forward(edge):
            self._wait_for_room(edge, lambda: self._forward(edge), zmq.POLLOUT, message)

    def _forward(self, edge: Edge, most: int | None = None) -> bool:
        """Hand over what waits, as far as there is room. Whether `most` messages, or the queue's limit, wait still."""
        assert edge.backlog is not None
        while edge.backlog and edge.has_room():
            self._put(edge, edge.backlog.popleft())
        return len(edge.backlog) <= (self.queue if most is None else most)

    def _forwarded(self) -> list[Side]:
        """Hand over what waits, on every edge; those on which something waits still, and for room only."""
        waits = [side for side, edge in self._edges.items() if edge.backlog is not None and not self._forward(edge, 0)]
        return [side for side in waits if not self._edges[side].held_back]

    def _put(self, edge: Edge, message: Message) -> None:
        with self.packing:
            frames = codec.encode(message, edge.token, edge.sent)
        self._check_size(message, frames[1:])
        self._hand_over(edge, frames, message)
        edge.count_sent(message)

    def _check_size(self, message: Message, tensors: Sequence[Sized]) -> None:
        largest = max(map(len, tensors), default=0)
        if largest > self.max_message:
            raise MessageError(
                f"a {type(message).__name__} holds a tensor of {largest} bytes, the limit is {self.max_message}: "
                "raise transport.max_message"
            )

    def _hand_over(self, edge: Edge, frames: Sequence[Frame], message: Message) -> None:
        """Message number `edge.sent`, as frames."""
        sealed = edge.seal(frames)
        if not edge.put(sealed):
            self._wait_for_room(edge, lambda: edge.put(sealed), zmq.POLLOUT, message)

    def _wait_for_room(self, edge: Edge, room: Callable[[], bool], event: int, message: Message) -> None:
        if not self._until(edge, room, event, self.timeout):
            raise WaitTimeout(
                f"waited {self.timeout:g} s (transport.timeout) to send a {type(message).__name__} of batch "
                f"{getattr(message, 'batch', None)} to {edge.name}, which takes nothing more; {edge.history()}"
            )

    def _until(self, edge: Edge, done: Callable[[], bool], event: int, seconds: float) -> bool:
        """Wait until `done`, asked again at each event of the edge's socket. False at the limit. Raises PeerLost."""
        deadline = time.monotonic() + seconds
        while not done():
            for each in self._edges.values():
                each.watch()
            self._check(edge)
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poller = zmq.Poller()
            poller.register(edge.socket, 0 if edge.held_back else event)
            for each in self._edges.values():
                poller.register(each.monitor, zmq.POLLIN)
            with self.full:
                self._poll(poller, [edge], left)
        return True

    # -- receiving ---------------------------------------------------------------------------------------------

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        """The next message, None after `timeout` or a wake. Raises PeerLost after a lost side's last message.

        Raises PeerLost if messages before this one are missing, or if a side keeps sending what is none.
        """
        edges = [self._edges[side] for side in sides]
        ready = dict(self._poller(sides, self._forwarded()).poll(0))  # one call into zmq asks all sockets and monitors
        deadline = None
        while not self._waker.was_woken():
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
                ready = self._poll(self._poller(sides, self._forwarded()), edges, min(left, LOOK_EVERY))
            if not ready:
                for edge in edges:
                    self._look_for(edge)
        return None

    def _look_for(self, edge: Edge) -> None:
        """What is on its way; one who is still, whose kernel keeps the connection, was stopped. Raises PeerLost."""
        edge.look()
        if edge.still > STILL:
            self._cut(edge, f"{edge.name} is gone: not a byte has come from it for {edge.still:.0f} s")

    def _sound(self, edges: Sequence[Edge]) -> bool:
        """Whether there is anything to wait for. Raises PeerLost."""
        for edge in edges:
            self._check(edge)
        return True

    def _check(self, edge: Edge) -> None:
        """Raises PeerLost if the neighbour is gone, or must go."""
        self._check_key(edge)
        edge.check()

    def _take(self, edge: Edge) -> Message | None:
        """A message that is there already."""
        while got := edge.kept.popleft() if edge.kept else self._fetch(edge):
            try:
                message = self._read(edge, *got)
            except MessageError as error:
                self._drop(edge, error)
                continue
            if message is not None:
                return message
        return None

    def _fetch(self, edge: Edge) -> tuple[Header, list[Frame]] | None:
        """Header and tensors' frames of the next message in order, if it is there; what else comes is dropped."""
        while not edge.torn:
            try:
                frames = edge.get()
                if frames is None:
                    break
                with self.packing:
                    header = self._header(edge, frames)
                if self._is_next(edge, header):
                    return header, [frame.buffer for frame in frames[1:]]
            except MessageError as error:
                self._drop(edge, error)
        return None

    def _header(self, edge: Edge, frames: list[zmq.Frame]) -> Header:
        """Of a message that came from the neighbour, undamaged, as far as can be told. Takes off what told it."""
        if edge.lock and not edge.lock.lets_in(frames[0]):
            raise MessageError(f"a message from {edge.name} whose key was revoked", reason="key revoked")
        edge.unseal(frames)
        return codec.read_header(frames[0].buffer if frames else b"")

    def _is_next(self, edge: Edge, header: Header) -> bool:
        """Whether this is the next message of the run. Raises MessageError for another run's, PeerLost at a gap."""
        if header.run != edge.token:
            raise MessageError(f"a message of another run came in the place of {edge.name}'s", reason="another run")
        edge.check_order(header.seq)
        return True

    def _read(self, edge: Edge, header: Header, frames: Sequence[Frame | Tensor]) -> Message | None:
        """None: it was for the transport itself. Raises MessageError: then it counts as one that never came."""
        with self.packing:
            message = codec.read_body(header, frames, self.max_message)
            self.fits(edge.side, message)
        edge.count_received(message)
        return message

    # -- what is not let in ------------------------------------------------------------------------------------

    def _drop(self, edge: Edge, error: MessageError) -> None:
        """Counted; who keeps sending such is cut off."""
        self.dropped.note(error.reason, str(error))
        edge.bad.append(str(error))
        if len(edge.bad) >= BAD_LIMIT:
            self._cut(edge, f"{edge.name} keeps sending what is no message for this stage, the last of many: {error}")

    def _check_key(self, edge: Edge) -> None:
        if edge.lock and not edge.lock.valid():
            self._cut(edge, f"the key of {edge.name} was revoked")

    def _cut(self, edge: Edge, why: str) -> None:
        """End the neighbour's connection."""
        edge.cut()
        self._pollers.clear()  # they knew another socket
        self._away(edge, why)

    def _away(self, edge: Edge, why: str) -> None:
        """Raises PeerLost."""
        edge.torn = True
        edge.lose(why)

    # -- waiting -----------------------------------------------------------------------------------------------

    def _poll(self, poller: zmq.Poller, edges: Iterable[Edge], seconds: float) -> dict[Any, int]:
        """Sleep until something wanted, or an event of a connection, or a lost edge's grace is over, or the limit.

        Returns what is ready, sockets as they were registered.
        """
        now = time.monotonic()
        ends = [edge.deadline - now for edge in edges if edge.deadline is not None]
        ends += [LOOK_EVERY] * (self.ring is not None)
        return dict(poller.poll(math.ceil(1000 * max(0.0, min([seconds, *ends])))))

    def _poller(self, sides: Sequence[Side], full: Sequence[Side]) -> zmq.Poller:
        """Wakes for messages from `sides`, for room where it was `full`, for what the monitors tell, and for `wake`."""
        key = (*sides, None, *full)
        if key not in self._pollers:
            poller = self._pollers[key] = zmq.Poller()
            for side, edge in self._edges.items():
                if flags := zmq.POLLIN * (side in sides) | zmq.POLLOUT * (side in full):
                    poller.register(edge.socket, flags)
                poller.register(edge.monitor, zmq.POLLIN)
            poller.register(self._waker.file, zmq.POLLIN)
        return self._pollers[key]

    def wake(self) -> None:
        """Make a `receive` that waits, or the next one, return None at once. Safe in a signal handler."""
        self._waker.wake()

    # -- ending ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Deliver what was sent, for at most LINGER seconds, then let go of every socket and file."""
        if self._closed:
            return
        self._closed = True
        self._waker.close()
        for edge in self._edges.values():
            if edge.backlog:
                with contextlib.suppress(PeerLost):
                    self._until(edge, partial(self._forward, edge, 0), zmq.POLLOUT, LINGER)
        super().close()
