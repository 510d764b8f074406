"""Ways between two sockets that somebody sits on: connections can be cut, a bit flipped, and what passed said again.

who connects ── forth ──► Relay ──► target
             ◄── back ───       ◄──
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

LOOPBACK = "127.0.0.1"
GREETING = 64  # bytes in which both sides of a connection say that they speak ZeroMQ
MORE, LONG, COMMAND = 1, 2, 4  # flags of a frame
KEPT = 50  # pieces of a connection's beginning: parts of the greeting, frames
TALK = 8  # of these, after which the other end is given a moment to answer
MOMENT = 0.1  # seconds
RECENT = 16  # messages

Passed = Callable[[bytes], bytes]  # what came, to what goes on


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return str(probe.getsockname()[1])


class Relay:
    """A tcp relay between two sockets, whose connections can be cut. `address`: where it listens."""

    def __init__(self, address: str = LOOPBACK) -> None:
        self._server = socket.create_server((address, 0))
        self.port: int = self._server.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        return self

    def start(self, target: str) -> str:
        host, port = target.removeprefix("tcp://").split(":")
        self._run(self._accept, (host, int(port)))
        return f"tcp://{self._server.getsockname()[0]}:{self.port}"

    def _run(self, what: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=what, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, target: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            while True:
                one = self._server.accept()[0]
                try:
                    other = socket.create_connection(target)
                except OSError:  # nobody listens there at this moment
                    one.close()
                    continue
                self._open += [one, other]
                self._run(self._pump, one, other, self._way(forth=True))
                self._run(self._pump, other, one, self._way(forth=False))

    def _way(self, forth: bool) -> Passed:
        """One direction of a new connection."""
        return bytes

    def _pump(self, source: socket.socket, target: socket.socket, way: Passed) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(way(data))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        while self._open:
            connection = self._open.pop()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join()


class Flipper(Relay):
    """A relay that flips one bit, when it is told to."""

    def __init__(self, address: str = LOOPBACK) -> None:
        super().__init__(address)
        self._left: dict[bool, tuple[int, int]] = {}  # bytes until the one that is changed, and its bit, by direction

    def __enter__(self) -> Flipper:
        return self

    def flip(self, where: int, bit: int, forth: bool = True) -> None:
        """Of the byte `where` among those that pass in that direction from now on."""
        self._left[forth] = where, bit

    def flipped(self, forth: bool = True) -> bool:
        return forth not in self._left

    def _way(self, forth: bool) -> Passed:
        return lambda data: self._out(data, forth)

    def _out(self, data: bytes, forth: bool) -> bytes:
        if forth not in self._left:
            return data
        where, bit = self._left[forth]
        if where >= len(data):
            self._left[forth] = where - len(data), bit
            return data
        del self._left[forth]
        changed = bytearray(data)
        changed[where] ^= 1 << bit
        return bytes(changed)


class Recorder(Flipper):
    """One that also remembers what passes, encrypted or not, and can say it again, to the same connection.

    greeting, 64 bytes ─ frame ─ frame ─ …        a frame: flags, 1 byte; length, 1 byte, LONG: 8; so many bytes
    """

    def __init__(self, address: str = LOOPBACK) -> None:
        super().__init__(address)
        self.begun: dict[bool, list[bytes]] = {}  # the newest connection's first pieces, by direction
        self._recent = {forth: deque[bytes](maxlen=RECENT) for forth in (True, False)}  # messages, whole
        self._again: dict[bool, int] = {}

    def __enter__(self) -> Recorder:
        return self

    def say_again(self, messages: int, forth: bool = True) -> None:
        """So many of the last ones, behind the next that passes in that direction."""
        self._again[forth] = messages

    def said_again(self, forth: bool = True) -> bool:
        return forth not in self._again

    def _way(self, forth: bool) -> Passed:
        self.begun[forth] = []
        self._recent[forth].clear()
        return _Frames(self, forth)

    def _passes(self, piece: bytes, forth: bool) -> None:
        if len(self.begun[forth]) < KEPT:
            self.begun[forth].append(piece)

    def _ends(self, message: bytes, forth: bool) -> bytes:
        """What is to be said behind it."""
        self._recent[forth].append(message)
        count = self._again.pop(forth, 0)
        return b"".join(list(self._recent[forth])[-count:]) if count else b""


class _Frames:
    """One direction of a Recorder's connection: takes bytes as they come, hands on whole frames."""

    def __init__(self, recorder: Recorder, forth: bool) -> None:
        self._recorder, self._forth = recorder, forth
        self._greeting = GREETING  # bytes that are still to come of it: each side waits for the other within
        self._rest, self._message = bytearray(), bytearray()

    def __call__(self, data: bytes) -> bytes:
        out, data = bytearray(data[: self._greeting]), data[self._greeting :]
        self._greeting -= len(out)
        if out:
            self._recorder._passes(bytes(out), self._forth)
        self._rest += data
        while size := self._size():
            frame = bytes(self._rest[:size])
            del self._rest[:size]
            self._recorder._passes(frame, self._forth)
            out += frame + self._behind(frame)
        return self._recorder._out(bytes(out), self._forth)

    def _size(self) -> int:
        """Bytes of the next frame; 0 while it is not there whole."""
        rest = self._rest
        head = 9 if rest and rest[0] & LONG else 2
        size = head + int.from_bytes(rest[1:head], "big")
        return size if len(rest) >= max(size, head) else 0

    def _behind(self, frame: bytes) -> bytes:
        """What is to be said behind it."""
        if frame[0] & COMMAND:
            return b""
        self._message += frame
        if frame[0] & MORE:
            return b""
        message, self._message = bytes(self._message), bytearray()
        return self._recorder._ends(message, self._forth)


def play(endpoint: str, pieces: Sequence[bytes], seconds: float) -> None:
    """Say recorded pieces over a connection of its own, which stays for so long, or until it is closed there."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with contextlib.suppress(ConnectionError), socket.create_connection((host, int(port))) as one:
        for number, piece in enumerate(pieces):
            one.sendall(piece)
            if number < TALK:
                select.select([one], [], [], MOMENT)
                _heard(one)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and _heard(one):
            select.select([one], [], [], left)


def _heard(one: socket.socket) -> bool:
    """Take what is there. Whether the connection stands."""
    with contextlib.suppress(BlockingIOError):
        while one.recv(65536, socket.MSG_DONTWAIT):
            pass
        return False
    return True


__all__ = ["Flipper", "Recorder", "Relay", "free_port", "play"]
