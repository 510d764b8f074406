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
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo, Store

from dnipipe import keys
from dnipipe.beside import NOWHERE, Done
from dnipipe.errors import PeerLost
from dnipipe.keys import KeyRing
from dnipipe.messages import Checkpoint, Message
from dnipipe.staging import StagedTransport
from dnipipe.transport import Side, Transport, line
from dnipipe.transport.apart import ApartTransport, Bulk, choose_interface
from dnipipe.transport.gloo import INTERFACE, GlooTransport
from dnipipe.transport.laboratory import Laboratory
from dnipipe.transport.local import pipeline
from dnipipe.transport.nccl import NcclBulk, NcclTransport
from dnipipe.transport.zmq import ZmqTransport
from tests.transport import apart

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
            assert isinstance(before, ApartTransport) and isinstance(after, ApartTransport)
            store = HashStore()
            with ThreadPoolExecutor(1) as pool:
                joining = pool.submit(before.join, NEXT, store)
                after.join(PREVIOUS, store)
                joining.result()
        return transports


class Standing(Gloo):
    """The same with what NcclTransport does, but gloo in the place of NCCL and the main memory in that of a GPU."""

    def one(self, **options: Any) -> ZmqTransport:  # type: ignore[override]
        made = StandIn(
            "run", queue=options["queue"], timeout=options["timeout"], max_message=2**26, names={NEXT: "stage n"}
        )
        self.made.append(made)
        return made


class StandIn(NcclTransport):
    def __init__(self, run: str, **options: Any) -> None:
        super().__init__(run, lines=NOWHERE, **options)

    def _bulk_of(self, store: Store, rank: int, limit: timedelta) -> Bulk:
        return NcclBulk(lambda store, rank, limit: ProcessGroupGloo(store, rank, 2, limit), store, rank, limit, NOWHERE)


@pytest.fixture(scope="session")
def hosts() -> Iterator[list[apart.Host]]:
    if not torch.cuda.is_available():
        pytest.skip("NCCL needs a GPU")
    made = [apart.Host(end, apart.nccl) for end in range(3)]
    yield made
    for host in made:
        host.end()


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(line.GRACE, "tcp", 0.2)


@contextlib.contextmanager
def closed(factory: Zmq) -> Iterator[Zmq]:
    """Everything that it made, afterwards; and no socket file stays."""
    yield factory
    for transport in factory.made:
        transport.close()
    assert list(factory.folder.iterdir()) == []


@pytest.fixture(params=["ipc", "tcp"])
def zeromq(request: pytest.FixtureRequest, tmp_path: Path, short_grace: None) -> Iterator[Zmq]:
    with closed(Zmq(request.param, tmp_path)) as factory:
        yield factory


@pytest.fixture
def loopback_gloo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(INTERFACE, raising=False)
    choose_interface(INTERFACE, "gloo", machines=1)
    yield
    os.environ.pop(INTERFACE)


@pytest.fixture
def gloo(tmp_path: Path, short_grace: None, loopback_gloo: None) -> Iterator[Zmq]:
    with closed(Gloo("ipc", tmp_path)) as factory:
        yield factory


@pytest.fixture
def standing(tmp_path: Path, short_grace: None, loopback_gloo: None) -> Iterator[Zmq]:
    with closed(Standing("ipc", tmp_path)) as factory:
        yield factory


@pytest.fixture
def curve(tmp_path: Path, short_grace: None) -> Iterator[Curve]:
    factory = Curve("tcp", tmp_path)
    with contextlib.closing(factory):
        yield factory


class Prompt:
    """A device that has made everything at once: the main memory itself."""

    device = torch.device("cpu")

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()

    def mark(self, taken: bool = True) -> Done:
        return lambda wait: True


KINDS = ["local", "laboratory", "staged", "ipc", "tcp", "curve", "gloo", "nccl over gloo", "nccl"]
FIXTURES = {"curve": "curve", "gloo": "gloo", "nccl over gloo": "standing"}


@pytest.fixture(params=KINDS)
def chain(request: pytest.FixtureRequest, tmp_path: Path, short_grace: None) -> Iterator[Make]:
    """chain(stages, capacity, timeout) -> connected transports."""
    if request.param in FIXTURES:
        yield request.getfixturevalue(FIXTURES[request.param]).chain
        return
    if request.param == "nccl":
        with tempfile.TemporaryDirectory() as stores:
            yield from _nccl(request.getfixturevalue("hosts"), tmp_path, Path(stores))
        return

    def local(stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        return list(pipeline(stages, capacity, timeout))

    def laboratory(stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        return list(Laboratory(stages, capacity=capacity, timeout=timeout).transports)

    def staged(stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        return [StagedTransport(inner, Prompt()) for inner in pipeline(stages, capacity, timeout)]

    with closed(Zmq(request.param, tmp_path)) as factory:
        yield {"local": local, "laboratory": laboratory, "staged": staged}.get(request.param, factory.chain)


def _nccl(hosts: list[apart.Host], folder: Path, stores: Path) -> Iterator[Make]:
    made: list[apart.Remote] = []

    def make(stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        made.extend(apart.chain(hosts[:stages], folder, stores, capacity, timeout))
        return list(made)

    yield make
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(apart.Remote.close, made))
    assert list(folder.iterdir()) == []


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
