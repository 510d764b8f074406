"""Who may be at the other end of an edge: CURVE, with the keys of one stage only on each side.

    stage k, binds                                                  stage k+1, connects
      its own pair ◄─────────────── CURVE handshake ───────────────► its own pair, and a key of stage k's
      │ ZAP: "whose key is this?"
      └► Doorkeeper, a thread: only stage k+1's are let in

The doorkeeper is a thread of its own, for a stage may be busy for longer than a handshake may last. It cannot let
anyone in by failing: a connection that it does not answer for ends with the handshake's limit (ZAP_ENFORCE_DOMAIN).
"""

from __future__ import annotations

import contextlib
import threading

import zmq
from zmq.utils import z85

from dnipipe.errors import ConfigError
from dnipipe.keys import KeyRing
from dnipipe.transport.dropped import Dropped

ZAP = "inproc://zeromq.zap.01"
BYE = "inproc://dnipipe.doorkeeper"


class Lock:
    """The keys of one edge.

    Args:
        ring: this stage's.
        peer: the stage that must be at the other end. binds: whether that one connects to us.
    """

    def __init__(self, ring: KeyRing, peer: int, binds: bool) -> None:
        self.ring, self.peer, self.binds = ring, peer, binds
        self.key: bytes | None = None  # the neighbour's: that it came in with, or that we connect to
        self._tried = 0

    def check(self) -> None:
        """Raises ConfigError if no key of the neighbour is known."""
        if not self.ring.keys(self.peer):
            public = self.ring.folder / "public"
            raise ConfigError(
                f"security.keys = {self.ring.folder}: no key of stage {self.peer} in {public}: copy it there"
            )

    def put_on(self, socket: zmq.Socket[bytes]) -> None:
        """To be called before `socket` binds or connects. Without a `key` afterwards it cannot connect."""
        socket.curve_publickey, socket.curve_secretkey = self.ring.public, self.ring.secret
        if self.binds:
            socket.curve_server = True
            socket.zap_domain = domain(self.peer)
            socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer nobody is let in
            self.key = None
        elif known := self.ring.keys(self.peer):
            self.key = known[self._tried % len(known)]
            socket.curve_serverkey = self.key
        else:
            self.key = None

    def another(self) -> bool:
        """Connecting: try the neighbour's next key, if it has several: which of them it uses, only it knows."""
        self._tried += 1
        return len(self.ring.keys(self.peer)) > 1

    def lets_in(self, frame: zmq.Frame) -> bool:
        """Whether a message's first frame came from the neighbour, with a key that is still valid."""
        if self.binds:
            self.key = str(frame.get("User-Id")).encode()
        return self.valid()

    def valid(self) -> bool:
        """False once the neighbour's key was revoked."""
        return self.key is None or self.key in self.ring.keys(self.peer)


def domain(stage: int) -> bytes:
    """What the doorkeeper is asked about: an edge whose other end must be this stage."""
    return b"stage %d" % stage


class Doorkeeper:
    """Answers libzmq's question who may connect (ZAP, RFC 27), for all edges of one context.

    Args:
        dropped: counts those turned away.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], ring: KeyRing, dropped: Dropped) -> None:
        self.ring, self.dropped = ring, dropped
        self._asked, self._bye, self._end = (context.socket(kind) for kind in (zmq.REP, zmq.PAIR, zmq.PAIR))
        for socket in (self._asked, self._bye, self._end):
            socket.set(zmq.LINGER, 0)
        self._asked.bind(ZAP)
        self._end.bind(BYE)
        self._bye.connect(BYE)
        self._thread = threading.Thread(target=self._stand, name="doorkeeper", daemon=True)
        self._thread.start()

    def _stand(self) -> None:
        """Until `close`. The two sockets are this thread's from here on."""
        poller = zmq.Poller()
        poller.register(self._asked, zmq.POLLIN)
        poller.register(self._end, zmq.POLLIN)
        try:
            while self._end not in (ready := dict(poller.poll())):
                if self._asked in ready:
                    self._asked.send_multipart(self._answer(self._asked.recv_multipart()))
        finally:
            self._asked.close()
            self._end.close()

    def _answer(self, question: list[bytes]) -> list[bytes]:
        version, request, where = (*question, b"", b"", b"")[:3]
        try:
            key = z85.encode(question[6])
            stage = int(where.removeprefix(b"stage "))
            known = key in self.ring.keys(stage) or key in self.ring.keys(stage, anew=True)  # it may just be a new one
            if question[5] != b"CURVE" or not known:
                raise ValueError("a key that is not this neighbour's")
        except Exception as error:  # whatever it is: no
            reason = str(error) if isinstance(error, ValueError) else "a question that is none"
            self.dropped.note("connection refused", f"a connection for {where.decode(errors='replace')}: {reason}")
            return [version, request, b"400", b"not allowed", b"", b""]
        return [version, request, b"200", b"OK", key, b""]

    def close(self) -> None:
        """Nobody is let in any more. Waits for the thread, 5 s at most."""
        with contextlib.suppress(zmq.Again):  # it has ended already
            self._bye.send(b"", zmq.NOBLOCK)
        self._thread.join(5.0)
        self._bye.close()


__all__ = ["Doorkeeper", "Lock", "domain"]
