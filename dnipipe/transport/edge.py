"""One edge of a ZmqTransport: a line to a neighbour, and what has passed over it in each direction."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

import zmq

from dnipipe.codec import FRAME_LIMIT, Frame, Header, checksum
from dnipipe.errors import MessageError, PeerLost
from dnipipe.messages import Message
from dnipipe.transport.backlog import Backlog
from dnipipe.transport.limits import options
from dnipipe.transport.line import HASTE, Line

CAME_BEFORE = "came before"  # a message for the second time: why it is dropped

AHEAD = 2  # messages in front of which gradients wait: the one that is being written, and the next

# as plain numbers: arithmetic on zmq's enumerations costs more than the call that they are for
ONLY, MORE, WRITABLE = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.POLLOUT)
FIRST_OF_MANY = ONLY | MORE


class Edge(Line):
    """Messages to and from one neighbour. `lost` is why it is gone; "" while it is there, or not there yet.

    Args:
        queue, limit, linger: of limits.py.
        spare: gradients that may wait for room (Backlog); 0: whoever sends waits.
        line: of Line. Without a lock, messages over tcp carry a checksum.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        name: str,
        endpoint: str,
        queue: int,
        limit: int,
        linger: float,
        *,
        spare: int = 0,
        **line: Any,
    ) -> None:
        tcp = endpoint.startswith("tcp://")
        table = options(queue, limit, linger, tcp, "[" in endpoint)
        if spare:
            table[zmq.SNDHWM] = AHEAD
        super().__init__(context, name, endpoint, table, **line)
        self.lost = ""
        self.torn = False  # messages are missing: what comes behind the gap is not handed out
        self.kept: deque[tuple[Header, list[Frame]]] = deque()  # taken from the socket while a send waited (gloo.py)
        self.backlog = Backlog(spare) if spare else None
        self.token = ""  # which messages from the neighbour are meant: of this run, or of this connection (service/)
        self.sent = self.received = 0  # messages, which is also the number of the next one
        self.last_sent: int | None = None  # batch ids
        self.last_received: int | None = None
        self.bad: list[str] = []  # what was wrong with the messages dropped since the last good one
        self._sealed = tcp and self.lock is None

    # -- frames ------------------------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Whether `put` would succeed."""
        return not self.held_back and bool(int(self.socket.get(zmq.EVENTS)) & WRITABLE)

    def put(self, frames: Sequence[Frame]) -> bool:
        """Frames, as `seal` made them. False if there is no room, or nobody to send to."""
        if self.held_back:
            return False
        # Only the first frame may be refused: a message is taken whole, or dropped whole if the connection breaks
        # under it. Refusing a later one would leave libzmq in the middle of a message.
        last = len(frames) - 1
        try:
            self.socket.send(frames[0], FIRST_OF_MANY if last else ONLY)
        except zmq.Again:
            return False
        for k in range(1, last + 1):
            self.socket.send(frames[k], MORE if k < last else 0, copy=False)
        return True

    def get(self) -> list[zmq.Frame] | None:
        """The frames of a message that is there; their memory is libzmq's own, not a copy. Raises MessageError."""
        try:
            frame = self.socket.recv(ONLY, copy=False)
        except zmq.Again:
            return None
        frames, more = [frame], 0
        while frame.more:
            frame = self.socket.recv(copy=False)
            if len(frames) < FRAME_LIMIT:
                frames.append(frame)
            else:
                more += 1
        self._got = time.monotonic()
        if more:
            raise MessageError(
                f"a message of {FRAME_LIMIT + more} frames from {self.name}, the limit is {FRAME_LIMIT}",
                reason="too many frames",
            )
        return frames

    def seal(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """The same frames, and their checksum if nothing else would notice a flipped bit."""
        return [*frames, checksum(frames)] if self._sealed else frames

    def unseal(self, frames: list[zmq.Frame]) -> None:
        """Take the checksum off, if there should be one. Raises MessageError if a bit of the message is another."""
        if self._sealed and frames.pop().bytes != checksum([frame.buffer for frame in frames]):
            raise MessageError(
                f"a message from {self.name} was damaged on the way, or its dnipipe is of another version: its "
                "checksum is another",
                reason="damaged",
            )

    # -- which message it is -----------------------------------------------------------------------------------

    def count_sent(self, message: Message) -> None:
        self.sent += 1
        self.last_sent = getattr(message, "batch", self.last_sent)

    def count_received(self, message: Message) -> None:
        self.received += 1
        self.bad.clear()
        self.last_received = getattr(message, "batch", self.last_received)

    def ahead(self, seq: int) -> int:
        """How many messages are missing before message `seq`; below 0: it came before. Unless 0 it is counted."""
        ahead = seq - self.received - len(self.kept)
        if ahead:
            self.dropped["behind a gap" if ahead > 0 else CAME_BEFORE] += 1
        return ahead

    def check_order(self, seq: int) -> None:
        """Raises PeerLost, now and ever after, if message `seq` is not the next one."""
        if not (ahead := self.ahead(seq)):
            return
        self.torn = True
        if ahead > 0:
            self.lose(f"{ahead} messages of {self.name} were lost on the way{self.dropped_so_far()}")
        self.lose(f"{self.name} was started again, it counts from {seq}, or somebody repeats what it said")

    def dropped_so_far(self) -> str:
        """What may explain a gap."""
        return f": {len(self.bad)} were dropped here, the last for {self.bad[-1]}" if self.bad else ""

    # -- its end -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises PeerLost if the neighbour is gone. For `receive`: after nothing more was there to get."""
        if self.lost:
            raise PeerLost(self.lost)
        if self.refused:
            self.lose(self.refused)
        if self.gone:
            self.lose(self.gone)

    def lose(self, what: str) -> NoReturn:
        """Raises PeerLost, and `check` from now on."""
        self.lost = f"{what} ({self.endpoint}; {self.history()})"
        raise PeerLost(self.lost)

    def history(self) -> str:
        return f"last batch received from it {self.last_received}, last batch sent to it {self.last_sent}"

    def cut(self) -> None:
        super().cut()
        self.bad.clear()

    def close(self) -> None:
        """What was sent is delivered in the background, if there is still somebody to deliver it to."""
        self.watch()
        if self.lost or self.deadline is not None:
            self.socket.set(zmq.LINGER, HASTE)
        self._let_go()
