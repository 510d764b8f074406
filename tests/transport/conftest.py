"""Neighbours for the tests: over every transport (`chain`), or over ZeroMQ's two schemes only (`zeromq`).

a ── next ──────► previous ── b        two neighbours, as chain() makes them
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from dnipipe import keys
from dnipipe.errors import PeerLost
from dnipipe.keys import KeyRing
from dnipipe.messages import Checkpoint, Message
from dnipipe.transport import Side, Transport, edge
from dnipipe.transport.gloo import INTERFACE, GlooTransport, choose_interface
from dnipipe.transport.laboratory import Laboratory
from dnipipe.transport.local import pipeline
from dnipipe.transport.zmq import ZmqTransport

PREVIOUS, NEXT = Side.PREVIOUS, Side.NEXT
WAIT = 20.0  # seconds; only a failing test waits so long

Make = Callable[..., list[Transport]]


class Zmq:
    """Makes connected ZmqTransports over one scheme; keeps them, to close them all."""

    kind: type[ZmqTransport] = ZmqTransport

    def __init__(self, scheme: str, folder: Path) -> None:
        self.scheme, self.folder = scheme, folder
        self.made: list[ZmqTransport] = []
        self._names = itertools.count()

    def one(
        self,
        run: str = "run",
        queue: int = 8,
        timeout: float = WAIT,
        limit: int = 2**26,
        ring: KeyRing | None = None,
        spare: int = 0,
    ) -> ZmqTransport:
        made = self.kind(
            run, queue=queue, timeout=timeout, max_message=limit, names={NEXT: "stage n"}, ring=ring, spare=spare
        )
        self.made.append(made)
        return made

    def address(self) -> str:
        return "tcp://127.0.0.1:*" if self.scheme == "tcp" else f"ipc://{self.folder}/{next(self._names)}"

    def chain(self, stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        transports = [self.one(queue=capacity, timeout=timeout) for _ in range(stages)]
        for before, after in itertools.pairwise(transports):
            after.connect(before.listen(self.address()))
        return list(transports)


class Curve(Zmq):
    """The same over tcp with keys: stage k of a chain has the pair of stage k."""

    def __init__(self, scheme: str, folder: Path) -> None:
        super().__init__(scheme, folder)
        self._keys = tempfile.TemporaryDirectory()
        self.keys = Path(self._keys.name)
        assert list(keys.new(self.keys, [0, 1, 2]))

    def chain(self, stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        transports = [self.one(queue=capacity, timeout=timeout, ring=KeyRing(self.keys, k)) for k in range(stages)]
        for before, after in itertools.pairwise(transports):
            after.connect(before.listen(self.address()))
        return list(transports)

    def close(self) -> None:
        for transport in self.made:
            transport.close()
        self._keys.cleanup()


class Gloo(Zmq):
    """The same with GlooTransports, which have also joined by gloo: each pair at a store of its own."""

    kind = GlooTransport

    def chain(self, stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        transports = super().chain(stages, capacity, timeout)
        for before, after in itertools.pairwise(self.made[-stages:]):
            assert isinstance(before, GlooTransport) and isinstance(after, GlooTransport)
            store = HashStore()
            with ThreadPoolExecutor(1) as pool:
                joining = pool.submit(before.join, NEXT, store)
                after.join(PREVIOUS, store)
                joining.result()
        return transports


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(edge.GRACE, "tcp", 0.2)


@pytest.fixture(params=["ipc", "tcp"])
def zeromq(request: pytest.FixtureRequest, tmp_path: Path, short_grace: None) -> Iterator[Zmq]:
    factory = Zmq(request.param, tmp_path)
    yield factory
    for transport in factory.made:
        transport.close()
    assert list(tmp_path.iterdir()) == []  # no socket file stays


@pytest.fixture
def gloo(tmp_path: Path, short_grace: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gloo]:
    monkeypatch.delenv(INTERFACE, raising=False)
    choose_interface(machines=1)
    factory = Gloo("ipc", tmp_path)
    yield factory
    for transport in factory.made:
        transport.close()
    assert list(tmp_path.iterdir()) == []
    os.environ.pop(INTERFACE)


@pytest.fixture
def curve(tmp_path: Path, short_grace: None) -> Iterator[Curve]:
    factory = Curve("tcp", tmp_path)
    with contextlib.closing(factory):
        yield factory


@pytest.fixture(params=["local", "laboratory", "ipc", "tcp", "curve", "gloo"])
def chain(request: pytest.FixtureRequest, tmp_path: Path, short_grace: None) -> Iterator[Make]:
    """chain(stages, capacity, timeout) -> connected transports."""
    if request.param in ("curve", "gloo"):
        yield request.getfixturevalue(request.param).chain
        return
    factory = Zmq(request.param, tmp_path)

    def local(stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        return list(pipeline(stages, capacity, timeout))

    def laboratory(stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        return list(Laboratory(stages, capacity=capacity, timeout=timeout).transports)

    yield {"local": local, "laboratory": laboratory}.get(request.param, factory.chain)
    for transport in factory.made:
        transport.close()
    assert list(tmp_path.iterdir()) == []


def take(transport: Transport, side: Side) -> Message:
    got = transport.receive([side], WAIT)
    assert got is not None and got[0] is side
    return got[1]


def batches(transport: Transport, side: Side, count: int) -> list[int]:
    return [
        message.batch for message in (take(transport, side) for _ in range(count)) if isinstance(message, Checkpoint)
    ]


def assert_lost(transport: Transport, side: Side, says: str = "closed|gone") -> None:
    """The neighbour is reported lost, on receive and on send, and stays so."""
    for _ in range(2):
        with pytest.raises(PeerLost, match=says):
            transport.receive([side], WAIT)
    with pytest.raises(PeerLost, match=says):
        transport.send(side, Checkpoint(0))
