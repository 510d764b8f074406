"""Six ways for a tensor from one process to another, alike in sockets, options and pattern.

    ipc, tcp         raw pyzmq: a small header and the tensor's bytes, copy=False both ways
    gloo             raw torch.distributed: isend and irecv, a process group for each direction
    dnipipe-…        a transport of dnipipe's over the same

Over messages the receiver answers every EACH tensors by a small message, and WINDOW of them may lack their answer.
gloo needs none: an isend is complete when its receiver has asked for it, so WINDOW isends and irecvs are open.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import zmq
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

from dnipipe.messages import Gradient
from dnipipe.transport import Side
from dnipipe.transport.apart import choose_interface
from dnipipe.transport.gloo import INTERFACE, GlooTransport
from dnipipe.transport.limits import options
from dnipipe.transport.zmq import ZmqTransport

WINDOW = 8  # tensors under way
EACH = 4  # of them are answered together
QUEUE = 512  # messages that may wait at each end, as in a run
LARGEST = 2**26  # bytes of a message
LIMIT = 60.0  # seconds of any wait
BASES = {"dnipipe-ipc": "ipc", "dnipipe-tcp": "tcp", "dnipipe-gloo": "gloo"}  # what each is measured against
NAMES = (*BASES.values(), *BASES)


class Channel(Protocol):
    """One process's end. What rank 0 does first, rank 1 does second; both with the same numbers."""

    def flood(self, tensors: Sequence[Tensor], count: int) -> None:
        """Send so many tensors, a multiple of WINDOW, these in turn, and return when all have arrived."""

    def drain(self, like: Tensor, count: int) -> None:
        """Receive so many."""

    def ping(self, x: Tensor, count: int) -> None:
        """Send one and receive one, so many times."""

    def pong(self, x: Tensor, count: int) -> None:
        """Receive one and send one."""

    def close(self) -> None: ...


class Messages(ABC):
    """A channel of messages, which may be empty."""

    @abstractmethod
    def send(self, x: Tensor | None) -> None: ...

    @abstractmethod
    def receive(self) -> Tensor | None: ...

    def flood(self, tensors: Sequence[Tensor], count: int) -> None:
        for number in range(count):
            if number >= WINDOW and number % EACH == 0:
                self.receive()
            self.send(tensors[number % len(tensors)])
        for _ in range(min(WINDOW, count) // EACH):
            self.receive()

    def drain(self, like: Tensor, count: int) -> None:
        for number in range(count):
            assert self.receive() is not None
            if number % EACH == EACH - 1:
                self.send(None)

    def ping(self, x: Tensor, count: int) -> None:
        for _ in range(count):
            self.send(x)
            self.receive()

    def pong(self, x: Tensor, count: int) -> None:
        for _ in range(count):
            self.receive()
            self.send(x)


class RawZmq(Messages):
    """The least that pyzmq asks for."""

    HEADER = bytes(100)  # about as long as dnipipe's

    def __init__(self, rank: int, address: str, store: Store) -> None:
        self.context = zmq.Context(io_threads=1)
        self.socket = self.context.socket(zmq.DEALER)
        for option, value in options(QUEUE, LARGEST, 0.0, address.startswith("tcp"), False).items():
            self.socket.set(option, value)
        for wait in (zmq.SNDTIMEO, zmq.RCVTIMEO):
            self.socket.set(wait, int(1000 * LIMIT))
        if rank == 0:
            self.socket.bind(address)
            store.set("endpoint", self.socket.get_string(zmq.LAST_ENDPOINT))
        else:
            self.socket.connect(store.get("endpoint").decode())

    def send(self, x: Tensor | None) -> None:
        if x is None:
            self.socket.send(self.HEADER)
        else:
            self.socket.send(self.HEADER, zmq.SNDMORE)
            self.socket.send(x.numpy().data.cast("B"), copy=False)

    def receive(self) -> Tensor | None:
        frame = self.socket.recv(copy=False)
        return torch.frombuffer(self.socket.recv(copy=False).buffer, dtype=torch.float32) if frame.more else None

    def close(self) -> None:
        self.context.destroy(linger=0)


class Ours(Messages):
    """A transport of dnipipe's. A gradient is its message with one tensor, or none."""

    def __init__(self, rank: int, address: str, store: Store, base: str) -> None:
        kind = GlooTransport if base == "gloo" else ZmqTransport
        self.transport: ZmqTransport = kind("benchmark", queue=QUEUE, timeout=LIMIT, max_message=LARGEST)
        self.side, self.sent = (Side.NEXT, Side.PREVIOUS)[rank], 0
        if rank == 0:
            store.set("endpoint", self.transport.listen(address))
        else:
            self.transport.connect(store.get("endpoint").decode())
        if isinstance(self.transport, GlooTransport):
            self.transport.join(self.side, PrefixStore("gloo", store))

    def send(self, x: Tensor | None) -> None:
        self.sent += 1
        self.transport.send(self.side, Gradient(self.sent, x))

    def receive(self) -> Tensor | None:
        got = self.transport.receive([self.side], LIMIT)
        assert got is not None and isinstance(got[1], Gradient)
        return got[1].g

    def close(self) -> None:
        self.transport.close()


class RawGloo:
    """isend and irecv; what is received into is reserved once."""

    def __init__(self, rank: int, store: Store) -> None:
        limit = timedelta(seconds=LIMIT)
        down, up = (ProcessGroupGloo(PrefixStore(way, store), rank, 2, limit) for way in ("down", "up"))
        self.out, self.into, self.peer = (down, up, 1) if rank == 0 else (up, down, 0)

    def _send(self, x: Tensor) -> Work:
        return self.out.send([x], self.peer, 0)  # type: ignore[attr-defined, no-any-return]

    def _receive(self, x: Tensor) -> Work:
        return self.into.recv([x], self.peer, 0)  # type: ignore[attr-defined, no-any-return]

    def flood(self, tensors: Sequence[Tensor], count: int) -> None:
        works: deque[Work] = deque()
        for number in range(count):
            if number >= WINDOW:
                works.popleft().wait()
            works.append(self._send(tensors[number % len(tensors)]))
        for work in works:
            work.wait()

    def drain(self, like: Tensor, count: int) -> None:
        rooms = [torch.empty_like(like) for _ in range(WINDOW)]
        works = deque(self._receive(room) for room in rooms[:count])
        for number in range(count):
            works.popleft().wait()
            if number + WINDOW < count:
                works.append(self._receive(rooms[number % WINDOW]))

    def ping(self, x: Tensor, count: int) -> None:
        room = torch.empty_like(x)
        for _ in range(count):
            sent = self._send(x)
            self._receive(room).wait()
            sent.wait()

    def pong(self, x: Tensor, count: int) -> None:
        room = torch.empty_like(x)
        for _ in range(count):
            self._receive(room).wait()
            self._send(x).wait()

    def close(self) -> None:
        del self.out, self.into


def opened(name: str, rank: int, folder: Path) -> Channel:
    """This rank's end. The folder, both ranks', is for socket files, and for the store where they meet."""
    base = BASES.get(name, name)
    if base == "gloo":
        choose_interface(INTERFACE, "gloo", machines=1)
    store = FileStore(str(folder / f"{name}.store"), 2)
    address = "tcp://127.0.0.1:*" if base == "tcp" else f"ipc://{folder}/{name}"
    if name == "gloo":
        return RawGloo(rank, store)
    return Ours(rank, address, store, base) if name in BASES else RawZmq(rank, address, store)


__all__ = ["BASES", "NAMES", "WINDOW", "Channel", "opened"]
