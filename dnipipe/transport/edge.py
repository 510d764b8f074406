"""One edge of a ZmqTransport: a socket, its monitor, and what has passed in each direction.

connections, as the monitor tells them:   none ──handshake──► live ──last one ends──► grace ──► lost, for good
                                                                ▲                       │
                                                                └───────handshake───────┘   (tcp: zmq reconnects)
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import zmq
from zmq.utils.monitor import recv_monitor_message

from dnipipe.codec import FRAME_LIMIT, HEADER_LIMIT, Frame, Header
from dnipipe.errors import ConfigError, MessageError, PeerLost
from dnipipe.messages import Message

# Seconds without a connection after which a neighbour is lost. A closed socket file never comes back; the moment is for
# what libzmq has read but not yet handed over when it reports the end.
GRACE = {"ipc": 0.05, "tcp": 2.0}

EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def options(queue: int, max_message: int, linger: float, tcp: bool, ipv6: bool) -> dict[zmq.SocketOption, int]:
    """Every option that decides about memory, waiting or strangers; ZeroMQ's own value after each reason."""
    table = {
        zmq.SNDHWM: queue,  # messages held for a neighbour that is slow; then send waits (1000)
        zmq.RCVHWM: queue,  # messages held for us (1000)
        zmq.MAXMSGSIZE: max(max_message, HEADER_LIMIT),  # bytes a frame may make us reserve (no limit)
        zmq.LINGER: int(1000 * linger),  # ms in which close delivers what was sent (for ever)
        zmq.HANDSHAKE_IVL: 2000,  # ms until a silent connection is closed, or strangers use up our files (30000)
        zmq.RECONNECT_IVL: 100,  # ms before the first try to connect again (100)
        zmq.RECONNECT_IVL_MAX: 500,  # ms, to which it doubles; who comes back is not kept waiting (no doubling)
        zmq.IMMEDIATE: 0,  # 1 would, when the neighbour closes, discard what it sent and we have not read yet (0)
        zmq.SNDTIMEO: 1000,  # ms: our calls do not wait, we poll; a mistake must not hang (for ever)
        zmq.RCVTIMEO: 1000,  # ms, likewise (for ever)
        zmq.BACKLOG: 8,  # connections waiting to be accepted: there is one neighbour (100)
        zmq.IPV6: int(ipv6),  # off unless the address is one: else "localhost" may be two addresses (0)
    }
    if tcp:  # a socket file's other end cannot vanish without a trace
        table |= {
            zmq.HEARTBEAT_IVL: 1000,  # ms between two signs of life (none)
            zmq.HEARTBEAT_TIMEOUT: 10000,  # ms without one, until the connection counts as broken (IVL)
            zmq.HEARTBEAT_TTL: 10000,  # ms, the same asked of the neighbour (none)
        }
    return table


def check_address(address: str) -> None:
    """Raises ConfigError unless it is ipc with a path, or tcp with one interface's address and a port."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        if not rest or rest[0] in "*@":  # a file in the working folder; an abstract name that any user may connect to
            raise ConfigError(f"{address}: give the path of a socket file, ipc:///folder/file")
        return
    host, colon, port = rest.rpartition(":")
    known = port == "*" or (port.isdecimal() and 0 < int(port) < 2**16)
    if scheme != "tcp" or not colon or not known:
        raise ConfigError(
            f"{address}: expected ipc:///folder/file, or tcp://address:port with a port of 1 to 65535 or *"
        )
    if _is_every_interface(host.strip("[]")):
        raise ConfigError(f"{address} would listen on all interfaces: set transport.address to the one to use")


def _is_every_interface(host: str) -> bool:
    if host in ("", "*"):
        return True
    try:  # by way of the resolver, since 0.0.0.0 has many spellings: 0, 0x0, ::ffff:0.0.0.0
        numbers = {ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (socket.gaierror, ValueError):
        return False  # the name of an interface, or nothing: zmq will say
    mapped = {number.ipv4_mapped for number in numbers if isinstance(number, ipaddress.IPv6Address)}
    return any(number.is_unspecified for number in numbers | mapped if number)


WATCH_EVERY = 0.02  # seconds

# as plain numbers: arithmetic on zmq's enumerations costs more than the call that they are for
ONLY, MORE, READABLE = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.POLLIN)
FIRST_OF_MANY = ONLY | MORE


class Edge:
    """A socket to one neighbour. `lost` is why it is gone; "" while it is there, or not there yet."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], name: str, endpoint: str, queue: int, limit: int, linger: float
    ) -> None:
        self.name, self.endpoint = name, endpoint
        self.file: Path | None = None  # that listening made
        self.lost = ""
        self.torn = False  # messages are missing: what comes behind the gap is not handed out
        self.kept: deque[tuple[Header, list[Frame]]] = deque()  # taken from the socket while a send waited (gloo.py)
        self.deadline: float | None = None  # when it is lost, unless a new connection comes
        self.token = ""  # which messages from the neighbour are meant: of this run, or of this connection (service/)
        self.handshakes = 0  # connections there have been
        self.sent = self.received = 0  # messages, which is also the number of the next one
        self.last_sent: int | None = None  # batch ids
        self.last_received: int | None = None
        self._connections: set[int] = set()  # file descriptors
        self._greeted = False  # a handshake has succeeded
        self._watched = 0.0  # when the monitor was last asked
        scheme = endpoint.partition("://")[0]
        self.grace = GRACE[scheme]
        self.socket = context.socket(zmq.DEALER)
        for option, value in options(queue, limit, linger, scheme == "tcp", "[" in endpoint).items():
            self.socket.set(option, value)
        self.monitor = self.socket.get_monitor_socket(EVENTS)
        self.monitor.set(zmq.LINGER, 0)

    # -- messages ----------------------------------------------------------------------------------------------

    def put(self, frames: Sequence[Frame]) -> bool:
        """False if there is no room, or nobody to send to."""
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
        if more:
            raise MessageError(f"a message of {FRAME_LIMIT + more} frames from {self.name}, the limit is {FRAME_LIMIT}")
        return frames

    def count_sent(self, message: Message) -> None:
        self.sent += 1
        self.last_sent = getattr(message, "batch", self.last_sent)

    def count_received(self, message: Message) -> None:
        self.received += 1
        self.last_received = getattr(message, "batch", self.last_received)

    def check_order(self, seq: int) -> None:
        """Raises PeerLost, now and ever after, if message `seq` is not the next one."""
        expected = self.received + len(self.kept)
        if seq > expected:
            self.torn = True
            self.lose(f"{seq - expected} messages of {self.name} were lost on the way")
        if seq < expected:
            self.torn = True
            self.lose(f"{self.name} was started again, it counts from {seq}")

    # -- the connection ----------------------------------------------------------------------------------------

    def watch_now_and_then(self) -> None:
        """`watch`, for a hot path where something else watches too."""
        if time.monotonic() - self._watched > WATCH_EVERY:
            self.watch()

    def watch(self) -> None:
        """Take in what the monitor has to tell."""
        self._watched = time.monotonic()
        while int(self.monitor.get(zmq.EVENTS)) & READABLE:
            event = recv_monitor_message(self.monitor)
            kind, descriptor = event["event"], event["value"]
            if kind in (zmq.EVENT_ACCEPTED, zmq.EVENT_CONNECTED):
                self._connections.add(descriptor)
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._greeted, self.deadline = True, None
                self.handshakes += 1
            elif kind == zmq.EVENT_DISCONNECTED:
                self._connections.discard(descriptor)
                if self._greeted and not self._connections and self.deadline is None:
                    self.deadline = time.monotonic() + self.grace

    @property
    def connected(self) -> bool:
        return self._greeted and bool(self._connections)

    def check(self) -> None:
        """Raises PeerLost if the neighbour is gone. For `receive`: after nothing more was there to get."""
        if self.lost:
            raise PeerLost(self.lost)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.lose(f"{self.name} is gone: its process ended, or the connection broke")

    def lose(self, what: str) -> NoReturn:
        """Raises PeerLost, and `check` from now on."""
        self.lost = f"{what} ({self.endpoint}; {self.history()})"
        raise PeerLost(self.lost)

    def history(self) -> str:
        return f"last batch received from it {self.last_received}, last batch sent to it {self.last_sent}"

    def close(self) -> None:
        """What was sent is delivered in the background, if there is still somebody to deliver it to."""
        self.watch()
        if self.lost or self.deadline is not None:
            self.socket.set(zmq.LINGER, 0)
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()
