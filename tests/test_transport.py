"""One contract, every transport: order, no silent gap, no wait without a limit, nothing left behind.

a ── next ──────► previous ── b        two neighbours, as `pair` makes them
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import zmq
from torch import Tensor

from dnipipe import codec
from dnipipe.errors import ConfigError, MessageError, PeerLost, WaitTimeout
from dnipipe.messages import Activation, Answer, Checkpoint, Gradient, Message, Stop
from dnipipe.transport import Side, Transport, edge
from dnipipe.transport.local import pipeline
from dnipipe.transport.zmq import ZmqTransport

PREVIOUS, NEXT = Side.PREVIOUS, Side.NEXT
WAIT = 20.0  # seconds; only a failing test waits so long

Make = Callable[..., list[Transport]]


class Zmq:
    """Makes connected ZmqTransports over one scheme; keeps them, to close them all."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.scheme, self.folder = scheme, folder
        self.made: list[ZmqTransport] = []
        self._names = itertools.count()

    def one(self, run: str = "run", queue: int = 8, timeout: float = WAIT, limit: int = 2**26) -> ZmqTransport:
        made = ZmqTransport(run, queue=queue, timeout=timeout, max_message=limit, names={NEXT: "stage n"})
        self.made.append(made)
        return made

    def address(self) -> str:
        return "tcp://127.0.0.1:*" if self.scheme == "tcp" else f"ipc://{self.folder}/{next(self._names)}"

    def chain(self, stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        transports = [self.one(queue=capacity, timeout=timeout) for _ in range(stages)]
        for before, after in itertools.pairwise(transports):
            after.connect(before.listen(self.address()))
        return list(transports)


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


@pytest.fixture(params=["local", "ipc", "tcp"])
def chain(request: pytest.FixtureRequest, tmp_path: Path, short_grace: None) -> Iterator[Make]:
    """chain(stages, capacity, timeout) -> connected transports."""
    factory = Zmq(request.param, tmp_path)

    def local(stages: int = 2, capacity: int = 8, timeout: float = WAIT) -> list[Transport]:
        return list(pipeline(stages, capacity, timeout))

    yield local if request.param == "local" else factory.chain
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


def assert_same(one: Message, other: Message) -> None:
    assert type(one) is type(other)
    for item in fields(one):
        a, b = getattr(one, item.name), getattr(other, item.name)
        assert torch.equal(a, b) and a.dtype == b.dtype and not b.requires_grad if isinstance(a, Tensor) else a == b


# -- what arrives ------------------------------------------------------------------------------------------------


def test_order_and_both_directions(chain: Make) -> None:
    a, b = chain(capacity=64)
    for k in range(50):
        a.send(NEXT, Checkpoint(k))
        b.send(PREVIOUS, Checkpoint(100 + k))
    assert batches(b, PREVIOUS, 50) == list(range(50))
    assert batches(a, NEXT, 50) == list(range(100, 150))


def test_both_directions_from_two_threads(chain: Make) -> None:
    a, b = chain(capacity=4)

    def talk(mine: Transport, side: Side) -> list[int]:
        heard = []
        for k in range(200):
            mine.send(side, Gradient(k, torch.full((64, 1024), float(k))))
            message = take(mine, side)
            assert isinstance(message, Gradient) and message.g is not None and bool((message.g == message.batch).all())
            heard.append(message.batch)
        return heard

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(talk, a, NEXT), pool.submit(talk, b, PREVIOUS)]
        assert [result.result() for result in results] == [list(range(200))] * 2


TENSORS = {
    "large": torch.arange(2**21, dtype=torch.float32),  # 8 MB
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(3.5),
    "bfloat16": torch.randn(5, 7).bfloat16(),
    "float16": torch.randn(5, 7).half(),
    "int64": torch.tensor([2**62, -(2**62)]),
    "bool": torch.tensor([True, False]),
    "transposed": torch.randn(300, 200).t(),
    "strided": torch.arange(20)[::3],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "gradient": torch.ones(3, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(chain: Make, name: str) -> None:
    a, b = chain()
    sent = Activation(7, TENSORS[name], torch.tensor([1, 2]))
    a.send(NEXT, sent)
    b.send(PREVIOUS, Answer(8, TENSORS[name]))
    assert_same(sent, take(b, PREVIOUS))
    assert_same(Answer(8, TENSORS[name]), take(a, NEXT))


def test_received_tensors_outlive_the_transport(chain: Make) -> None:
    a, b = chain()
    a.send(NEXT, Activation(1, torch.arange(1e5), torch.arange(3)))
    message = take(b, PREVIOUS)
    for transport in (a, b):
        transport.close()
    assert isinstance(message, Activation)
    assert torch.equal(message.x, torch.arange(1e5)) and torch.equal(message.y, torch.arange(3))


def test_the_side_named_first_comes_first(chain: Make) -> None:
    a, b, c = chain(3)
    for sides in ([NEXT, PREVIOUS], [PREVIOUS, NEXT]):
        a.send(NEXT, Checkpoint(1))
        c.send(PREVIOUS, Checkpoint(2))
        if isinstance(b, ZmqTransport):  # until both are there, whichever the kernel brings first
            assert all(edge.socket.poll(1000 * WAIT) for edge in b._edges.values())
        order = [b.receive(sides, WAIT) for _ in sides]
        assert [got and got[0] for got in order] == sides


# -- limits and waking -------------------------------------------------------------------------------------------


def test_receive_gives_up(chain: Make) -> None:
    a, b = chain()
    assert b.receive([PREVIOUS], 0) is None
    assert a.receive([NEXT], 0.05) is None
    assert a.receive([], 0.05) is None


def test_wake_before_and_during_receive(chain: Make) -> None:
    a, b = chain()
    b.wake()
    assert b.receive([PREVIOUS], WAIT) is None
    timer = threading.Timer(0.1, b.wake)
    timer.start()
    assert b.receive([PREVIOUS], WAIT) is None
    timer.join()
    a.send(NEXT, Checkpoint(1))
    assert batches(b, PREVIOUS, 1) == [1]  # and a wake is spent by the receive that it woke


def test_a_full_queue_makes_send_wait_and_then_give_up(chain: Make) -> None:
    a, b = chain(capacity=2, timeout=0.3)
    x = torch.zeros(2**18)  # 1 MB, so that sockets do not hold many
    sent = 0
    with pytest.raises(WaitTimeout, match=r"0.3 s"):
        while sent < 100:
            a.send(NEXT, Gradient(sent, x))
            sent += 1
    assert 2 <= sent < 20
    assert [take(b, PREVIOUS).batch for _ in range(sent)] == list(range(sent))  # type: ignore[union-attr]
    a.send(NEXT, Checkpoint(sent))
    assert batches(b, PREVIOUS, 1) == [sent]


def test_a_full_queue_goes_on_once_drained(chain: Make) -> None:
    a, b = chain(capacity=2)
    x = torch.zeros(2**18)

    def send_all() -> None:
        for k in range(40):
            a.send(NEXT, Gradient(k, x))

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_all)
        assert [take(b, PREVIOUS).batch for _ in range(40)] == list(range(40))  # type: ignore[union-attr]
        sending.result()


# -- endings -----------------------------------------------------------------------------------------------------


def test_what_was_sent_before_close_arrives(chain: Make) -> None:
    a, b = chain(capacity=64)
    for k in range(20):
        a.send(NEXT, Checkpoint(k))
    a.send(NEXT, Activation(20, torch.zeros(2**20), torch.zeros(1)))
    a.close()
    assert batches(b, PREVIOUS, 20) == list(range(20))
    assert isinstance(take(b, PREVIOUS), Activation)
    assert_lost(b, PREVIOUS)


def test_close_while_the_other_sends(chain: Make) -> None:
    a, b = chain(capacity=2)

    def flood() -> None:
        for k in range(10**6):
            a.send(NEXT, Gradient(k, torch.zeros(2**16)))

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(flood)
        take(b, PREVIOUS)
        b.close()
        with pytest.raises(PeerLost):
            sending.result(WAIT)


def test_a_lost_side_that_is_not_named_is_no_error(chain: Make) -> None:
    a, b, c = chain(3)
    c.send(PREVIOUS, Checkpoint(0))
    assert batches(b, NEXT, 1) == [0]
    c.close()
    a.send(NEXT, Checkpoint(1))
    assert batches(b, PREVIOUS, 1) == [1]
    assert b.receive([PREVIOUS], 0.2) is None
    assert_lost(b, NEXT)
    a.send(NEXT, Checkpoint(2))
    assert batches(b, PREVIOUS, 1) == [2]


def test_close_twice_and_wake_afterwards(chain: Make) -> None:
    for transport in chain(3):
        transport.close()
        transport.close()
        transport.wake()


# -- zmq only: late and dead neighbours, strangers, signals ----------------------------------------------------------


def test_the_neighbour_may_be_late(zeromq: Zmq) -> None:
    early, late = zeromq.one(), zeromq.one()
    endpoint = early.listen(zeromq.address())
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(early.send, NEXT, Checkpoint(1))  # waits: nobody is there
        late.connect(endpoint)
        assert batches(late, PREVIOUS, 1) == [1]
        sending.result()


def test_connecting_before_the_neighbour_listens(zeromq: Zmq) -> None:
    address = zeromq.address()
    if zeromq.scheme == "tcp":
        address = address.replace("*", _free_port())
    early, late = zeromq.one(), zeromq.one()
    early.connect(address)
    assert early.receive([PREVIOUS], 0) is None
    late.listen(address)
    early.send(PREVIOUS, Checkpoint(1))
    assert batches(late, NEXT, 1) == [1]


def test_nobody_there_is_a_wait_timeout(zeromq: Zmq) -> None:
    alone = zeromq.one(timeout=0.1)
    alone.listen(zeromq.address())
    with pytest.raises(WaitTimeout, match=r"0.1 s .* batch 5 to stage n"):
        alone.send(NEXT, Checkpoint(5))


def test_errors_say_who_and_what_was_last(zeromq: Zmq) -> None:
    a, b = zeromq.chain()
    a.send(NEXT, Checkpoint(41))
    b.send(PREVIOUS, Checkpoint(40))
    assert batches(b, PREVIOUS, 1) + batches(a, NEXT, 1) == [41, 40]
    b.close()
    assert_lost(a, NEXT, "stage n is gone.*last batch received from it 40, last batch sent to it 41")


CHILD = """
import sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
for message in sys.argv[2:]:
    socket.send_multipart([bytes.fromhex(frame) for frame in message.split(",")])
socket.recv()
"""


@pytest.mark.processes
def test_a_killed_neighbour_is_lost(zeromq: Zmq) -> None:
    parent = zeromq.one()
    endpoint = parent.listen(zeromq.address())
    sent = [Activation(k, torch.full((20,), float(k)), torch.zeros(1)) for k in range(3)]
    words = [",".join(bytes(frame).hex() for frame in codec.encode(m, "run", k)) for k, m in enumerate(sent)]
    child = subprocess.Popen([sys.executable, "-c", CHILD, endpoint, *words])  # without torch, which takes seconds
    try:
        for message in sent:
            assert_same(message, take(parent, NEXT))
        child.send_signal(signal.SIGKILL)
        assert_lost(parent, NEXT, "stage n is gone.*received from it 2")
    finally:
        child.kill()
        child.wait()


def test_a_connection_that_comes_back_goes_on(tmp_path: Path) -> None:
    """tcp: zmq connects again by itself; if nothing was under way, nothing is lost."""
    factory = Zmq("tcp", tmp_path)
    a, b = factory.one(), factory.one()
    with contextlib.closing(a), contextlib.closing(b), Relay() as relay:
        target = a.listen("tcp://127.0.0.1:*")
        b.connect(relay.start(target))
        for k in range(3):
            a.send(NEXT, Checkpoint(k))
            assert batches(b, PREVIOUS, 1) == [k]
            relay.cut()
            assert b.receive([PREVIOUS], 0.05) is None


def test_another_runs_messages_are_dropped_and_counted(zeromq: Zmq) -> None:
    stranger, b = zeromq.one(run="another"), zeromq.one()
    b.connect(stranger.listen(zeromq.address()))
    stranger.send(NEXT, Checkpoint(1))
    assert b.receive([PREVIOUS], 0.3) is None
    assert b.dropped == {"another run": 1}


@contextlib.contextmanager
def bare_peer(zeromq: Zmq, b: ZmqTransport) -> Iterator[zmq.Socket[bytes]]:
    """A bare socket in the place of b's previous stage."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.bind(zeromq.address())
        endpoint = socket.get_string(zmq.LAST_ENDPOINT)
        b.connect(endpoint)
        yield socket
    Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


GOOD = codec.encode(Checkpoint(1), "run", 0)


@pytest.mark.parametrize(
    "frames, says",
    [
        ([b"garbage"], "header"),
        ([b""], "header"),
        ([b"\x80" * 5000], "header: 5000 bytes"),
        ([*GOOD, b"more"], "Checkpoint: 1 tensor frames"),
        ([b"x"] * 3000, "3000 frames from the previous stage, the limit is 5"),
    ],
    ids=["garbage", "empty", "long", "frames", "flood"],
)
def test_garbage_is_a_message_error(zeromq: Zmq, frames: list[bytes], says: str) -> None:
    b = zeromq.one()
    with bare_peer(zeromq, b) as peer:
        peer.send_multipart(frames)
        with pytest.raises(MessageError, match=says):
            b.receive([PREVIOUS], WAIT)
        peer.send_multipart(GOOD)
        assert batches(b, PREVIOUS, 1) == [1]  # the garbage was taken whole


@pytest.mark.parametrize("numbers, says", [([0, 4], "3 messages of the previous"), ([0, 1, 0], "started again")])
def test_a_gap_is_a_lost_peer(zeromq: Zmq, numbers: list[int], says: str) -> None:
    b = zeromq.one()
    with bare_peer(zeromq, b) as peer:
        for number in numbers:
            peer.send_multipart(codec.encode(Checkpoint(number), "run", number))
        batches(b, PREVIOUS, len(numbers) - 1)
        assert_lost(b, PREVIOUS, says)


def test_a_tensor_above_the_limit_is_not_sent(zeromq: Zmq) -> None:
    a, b = zeromq.one(limit=100), zeromq.one()
    b.connect(a.listen(zeromq.address()))
    with pytest.raises(MessageError, match=r"400 bytes, the limit is 100: raise transport.max_message"):
        a.send(NEXT, Answer(1, torch.zeros(100)))
    a.send(NEXT, Answer(1, torch.zeros(25)))
    assert isinstance(take(b, PREVIOUS), Answer)


def test_a_signal_handler_wakes_receive(zeromq: Zmq) -> None:
    alone = zeromq.one()
    alone.listen(zeromq.address())
    before = signal.signal(signal.SIGUSR1, lambda *_: alone.wake())
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        assert alone.receive([NEXT], WAIT) is None
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "address, says",
    [
        ("tcp://*:*", "all interfaces"),
        ("tcp://0.0.0.0:5555", "all interfaces"),
        ("tcp://0:5555", "all interfaces"),
        ("tcp://[::]:*", "all interfaces"),
        ("tcp://[::ffff:0.0.0.0]:*", "all interfaces"),
        ("tcp://127.0.0.1", "expected"),
        ("udp://127.0.0.1:1", "expected"),
        ("ipc://*", "path"),
        ("ipc://@abstract", "path"),
        ("ipc:///no/such/folder/socket", "cannot listen on"),
        ("ipc://" + "/long" * 30, "cannot listen on"),
        ("tcp://127.0.0.1:99999", "1 to 65535"),
        ("tcp://192.0.2.1:*", "cannot listen on"),
    ],
)
def test_addresses_that_are_refused(address: str, says: str) -> None:
    transport = ZmqTransport("run", queue=8, timeout=1, max_message=1000)
    with contextlib.closing(transport), pytest.raises(ConfigError, match=says):
        transport.listen(address)


def test_a_socket_file_in_use_is_refused(tmp_path: Path) -> None:
    factory = Zmq("ipc", tmp_path)
    one, other = factory.one(), factory.one()
    with contextlib.closing(one), contextlib.closing(other):
        one.listen(f"ipc://{tmp_path}/here")
        with pytest.raises(ConfigError, match="exists already"):
            other.listen(f"ipc://{tmp_path}/here")
        other.connect(f"ipc://{tmp_path}/here")


def test_stop_after_an_error_still_goes_out(zeromq: Zmq) -> None:
    """A stage that fails tells its neighbour why and closes at once, though the neighbour keeps sending."""
    a, b = zeromq.chain(capacity=64)
    for k in range(30):
        a.send(NEXT, Gradient(k, torch.zeros(2**14)))
    b.send(PREVIOUS, Stop(0, "stage 1: the loss is NaN"))
    b.close()
    assert isinstance(take(a, NEXT), Stop)


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Relay:
    """A tcp relay between two sockets, whose connections can be cut."""

    def __init__(self) -> None:
        import socket

        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        return self

    def start(self, target: str) -> str:
        host, port = target.removeprefix("tcp://").split(":")
        self._run(self._accept, (host, int(port)))
        return f"tcp://127.0.0.1:{self._server.getsockname()[1]}"

    def _run(self, what: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=what, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self, target: tuple[str, int]) -> None:
        import socket

        with contextlib.suppress(OSError):
            while True:
                one = self._server.accept()[0]
                other = socket.create_connection(target)
                self._open += [one, other]
                self._run(self._pump, one, other)
                self._run(self._pump, other, one)

    @staticmethod
    def _pump(source, target) -> None:  # type: ignore[no-untyped-def]
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def cut(self) -> None:
        import socket

        while self._open:
            connection = self._open.pop()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def __exit__(self, *_: object) -> None:
        import socket

        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join()
