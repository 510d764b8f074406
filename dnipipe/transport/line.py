"""The way to one neighbour: a socket, and the connections that its monitor tells of.

connections, as the monitor tells them:   none ──handshake──► live ──last one ends──► grace ──► gone
                                                                ▲                       │
                                                                └───────handshake───────┘   (tcp: zmq reconnects)
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from dnipipe.socket_file import SocketFile
from dnipipe.transport import Side
from dnipipe.transport.arriving import Arriving
from dnipipe.transport.curve import Lock
from dnipipe.transport.dropped import Dropped
from dnipipe.transport.silent import CROWD, keep_waiting

# Seconds without a connection after which a neighbour is lost. A closed socket file never comes back; the moment is for
# what libzmq has read but not yet handed over when it reports the end.
GRACE = {"ipc": 0.05, "tcp": 2.0}

# ms in which a connection that is given up ends. Not 0: if it then breaks within a message at that very moment, libzmq
# aborts the whole process (its issue 3442).
HASTE = 100

OPENED = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED
# Not also EVENT_HANDSHAKE_FAILED_PROTOCOL: libzmq (4.3.5) sends it, too, of a message that CURVE finds changed on the
# way, or repeated, and forgets over it to end the connection. It reads nothing more there, or aborts.
FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
TRYING = zmq.EVENT_CONNECT_DELAYED | zmq.EVENT_CONNECT_RETRIED
ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
EVENTS = OPENED | FAILED | TRYING | ENDED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_LISTENING

# One of libzmq's threads for each side, as a bit: it looks up the name that it connects to, and a name server that does
# not answer holds it up for many seconds.
THREADS = {Side.PREVIOUS: 1, Side.NEXT: 2}

WATCH_EVERY = 0.02  # seconds

READABLE = int(zmq.POLLIN)  # a plain number: arithmetic on zmq's enumerations costs more than the call that it is for


class Line:
    """A socket to one neighbour, which binds or connects.

    Args:
        options: of the socket (limits.py).
        side: where the neighbour is; the one after this stage connects to us.
        lock: the keys of both ends.
        dropped: counts who was not let in.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        name: str,
        endpoint: str,
        options: dict[zmq.SocketOption, int],
        *,
        side: Side,
        lock: Lock | None,
        dropped: Dropped,
    ) -> None:
        self.name, self.endpoint, self.side, self.lock, self.dropped = name, endpoint, side, lock, dropped
        self.file: SocketFile | None = None  # that listening made
        self.refused = ""  # why the neighbour does not let us in; libzmq then tries no more
        self.deadline: float | None = None  # when it is gone, unless a new connection comes
        self.handshakes = 0  # connections there have been
        self.trying = False  # libzmq connects by itself
        self.still = 0.0  # seconds for which not a byte has come, as far as `look` can tell
        self.grace = GRACE[self.scheme]
        self._connections: set[int] = set()  # file descriptors
        self._ungreeted = 0  # of the connections: whose handshake is not over
        self._failed = 0  # how the last handshake did, if libzmq has told it
        self._listening: int | None = None  # that of the listening socket, as long as nobody need wait
        self._greeted = False  # a handshake has succeeded
        self._watched = 0.0  # when the monitor was last asked
        self._arriving = Arriving()
        self._got = self._watched  # when the last whole message came, or the connection stood
        self._part = 0.0  # when more of a message was seen to have come
        self._begun = 0.0  # when it was the first time that more of this one had
        self._within = False  # whether the last connection ended in the middle of one
        self._context, self._options = context, options
        self._open()

    @property
    def scheme(self) -> str:
        return self.endpoint.partition("://")[0]

    # -- the socket --------------------------------------------------------------------------------------------

    def _open(self) -> None:
        # until the first handshake: what the socket already had would be lost when another key is tried
        self.held_back = self.lock is not None and self.side is Side.PREVIOUS
        self._dialed = False
        self.socket = self._context.socket(zmq.DEALER)
        for option, value in self._options.items():
            self.socket.set(option, value)
        self.socket.set(zmq.AFFINITY, THREADS[self.side])
        if self.lock:
            self.lock.put_on(self.socket)
        self.monitor = self.socket.get_monitor_socket(EVENTS)
        self.monitor.set(zmq.LINGER, 0)

    def bind(self) -> None:
        """Listen at the endpoint, which becomes an exact one. Raises ZMQError."""
        self.socket.bind(self.endpoint)
        self.endpoint = self.socket.get_string(zmq.LAST_ENDPOINT)
        scheme, _, path = self.endpoint.partition("://")
        self.file = SocketFile(Path(path)) if scheme == "ipc" else None

    def dial(self) -> None:
        """Connect to the endpoint, again if a handshake failed. Raises ZMQError."""
        if self._dialed:  # or else libzmq would look the name up, in this thread
            with contextlib.suppress(zmq.ZMQError):  # it gave it up
                self.socket.disconnect(self.endpoint)
        self.refused = ""
        if self.lock:
            self.lock.put_on(self.socket)
            if self.lock.key is None:
                self.refused = f"no key of {self.name} is in {self.lock.ring.folder / 'public'}"
                return
        self.socket.connect(self.endpoint)
        self._dialed = self.trying = True

    def cut(self) -> None:
        """Every connection ends, with what was not sent within HASTE; whoever may come can come again."""
        binds = self.side is Side.NEXT
        if binds:
            self.socket.unbind(self.endpoint)
            while self.monitor.poll(1000):  # ms; until the address is free
                if recv_monitor_message(self.monitor)["event"] == zmq.EVENT_CLOSED:
                    break
        self.socket.set(zmq.LINGER, HASTE)  # and to close it: libzmq's disconnect leaves the other end connected
        self._let_go()
        self._open()
        (self.bind if binds else self.dial)()
        self._connections.clear()
        self._greeted, self.deadline, self._ungreeted, self.still = False, None, 0, 0.0

    def _let_go(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    # -- its connections ---------------------------------------------------------------------------------------

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
            if kind & OPENED:
                self._connections.add(descriptor)
                self._ungreeted += 1
                if len(self._connections) > CROWD and self._listening is not None and self.scheme == "tcp":
                    keep_waiting(self._listening)
                    self._listening = None  # once is enough
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._greeted, self.deadline, self.held_back = True, None, False
                self._got = self._watched
                self._ungreeted -= 1
                self.handshakes += 1
            elif kind == zmq.EVENT_DISCONNECTED:
                self._connections.discard(descriptor)
                self.trying = False
                if self._ungreeted:  # the neighbour's own connection may be the one; then the next end makes up for it
                    self._ungreeted -= 1
                    self._not_let_in()
                if self._greeted and not self._connections and self.deadline is None:
                    self._broke()
            elif kind & TRYING:
                self.trying = True
            elif kind & FAILED:
                self._failed = kind
            elif kind == zmq.EVENT_LISTENING:
                self._listening = descriptor

    def _broke(self) -> None:
        """The last connection has ended. Another may come, but not where part of a message was lost with it: nothing
        has to follow that would show the gap, and each side would wait for the other.
        """
        self._within = self._part > self._got
        self.deadline = self._watched + (GRACE["ipc"] if self._within else self.grace)

    def _not_let_in(self) -> None:
        """A handshake failed. Who binds goes on: it was a stranger. Who connects may have to try another key."""
        kind, self._failed = self._failed, 0
        if self.side is Side.NEXT:
            self.dropped["handshake failed"] += 1
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.refused = f"{self.name} does not accept this stage's key: copy its public file there"
        elif not kind:
            self.refused = f"{self.name} has keys and this stage has none, or the other way round (security.keys)"
        elif self.lock and self.lock.another():
            self.dial()

    @property
    def connections(self) -> int:
        """How many there are. Of several, libzmq sends each message to the next in turn."""
        return len(self._connections)

    @property
    def gone(self) -> str:
        """Why the neighbour, which was there, is there no more; "" while it may still come back by itself."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        within = " within a message" if self._within else ""
        return f"{self.name} is gone: its process ended, or the connection broke{within}" if late else ""

    @property
    def connected(self) -> bool:
        return self._greeted and bool(self._connections)

    def look(self) -> None:
        """See whether a message is on its way; of two connections one may be a stranger's: then nobody knows."""
        if len(self._connections) != 1:
            self.still = 0.0
            return
        (connection,) = self._connections
        if self._arriving.more(connection, self._got):
            if self._part <= self._got:
                self._begun = time.monotonic()
            self._part = time.monotonic()
        self.still = self._arriving.still(connection)

    def hears(self, since: float, patience: float) -> bool:
        """Whether part of a message has come since then, and that message has not taken longer than so many seconds."""
        self.look()
        return self._part > since and self._part - self._begun < patience

    @property
    def idle(self) -> bool:
        """Whether there is no connection, and none is tried: behind bytes that are none of its own libzmq gives up."""
        return not self._connections and not self.trying
