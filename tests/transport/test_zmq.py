"""ZeroMQ: late and dead neighbours, strangers and garbage, signals, addresses."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import zmq

from benchmarks.fuzz.targets import alike
from benchmarks.relay import Relay, free_port
from dnipipe import codec
from dnipipe.errors import ConfigError, MessageError, WaitTimeout
from dnipipe.messages import Activation, Answer, Checkpoint, Gradient, Stop
from dnipipe.metrics import Clock
from dnipipe.transport import limits
from dnipipe.transport import zmq as module
from dnipipe.transport.zmq import BAD_LIMIT, ZmqTransport
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, Zmq, assert_lost, batches, take


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
        address = address.replace("*", free_port())
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


def test_its_owner_can_tell_packing_and_a_full_queue_from_the_rest(zeromq: Zmq) -> None:
    a, b = zeromq.chain()
    alone = zeromq.one(timeout=0.1)
    alone.listen(zeromq.address())
    clocks = {transport: Clock() for transport in (a, b, alone)}
    for transport, clock in clocks.items():
        transport.packing, transport.full = clock.span("serialize"), clock.span("wait_send")  # type: ignore[attr-defined]
    for k in range(3):
        a.send(NEXT, Activation(k, torch.zeros(20), torch.zeros(1)))
        take(b, PREVIOUS)
    with pytest.raises(WaitTimeout):
        alone.send(NEXT, Checkpoint(5))
    entered = {label: [clock.span(label).entered for clock in clocks.values()] for label in ("serialize", "wait_send")}
    assert entered["serialize"] == [3, 6, 1]  # written, read (header and body), written
    assert entered["wait_send"][1] == 0 and entered["wait_send"][2] > 0  # the first may have waited for the second


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
    sealed = [
        [*frames, codec.checksum(frames)] if zeromq.scheme == "tcp" else frames
        for frames in (codec.encode(m, "run", k) for k, m in enumerate(sent))
    ]
    words = [",".join(bytes(frame).hex() for frame in frames) for frames in sealed]
    child = subprocess.Popen([sys.executable, "-c", CHILD, endpoint, *words])  # without torch, which takes seconds
    try:
        for message in sent:
            assert alike(message, take(parent, NEXT))
        child.send_signal(signal.SIGKILL)
        assert_lost(parent, NEXT, "stage n is gone.*received from it 2")
    finally:
        child.kill()
        child.wait()


@pytest.mark.processes
def test_a_stopped_neighbour_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel keeps the connection, and acknowledges what comes."""
    for each in (limits, module):
        monkeypatch.setattr(each, "STILL", 1)
    factory = Zmq("tcp", tmp_path)
    with contextlib.closing(factory.one()) as parent:
        endpoint = parent.listen(factory.address())
        child = subprocess.Popen([sys.executable, "-c", CHILD, endpoint, b"not ours".hex()])
        try:
            while not parent.dropped:
                assert parent.receive([NEXT], 0.1) is None
            assert parent.receive([NEXT], 3.0) is None  # only signs of life
            child.send_signal(signal.SIGSTOP)
            assert_lost(parent, NEXT, "stage n is gone: not a byte has come from it for")
        finally:
            child.kill()
            child.wait()


@pytest.mark.parametrize("idle", [0.0, 100.0])
def test_a_connection_that_comes_back_goes_on(tmp_path: Path, idle: float) -> None:
    """tcp: zmq connects again by itself; if nothing was under way, nothing is lost, however long nothing had come."""
    factory = Zmq("tcp", tmp_path)
    a, b = factory.one(), factory.one()
    with contextlib.closing(a), contextlib.closing(b), Relay() as relay:
        target = a.listen("tcp://127.0.0.1:*")
        b.connect(relay.start(target))
        for k in range(3):
            a.send(NEXT, Checkpoint(k))
            assert batches(b, PREVIOUS, 1) == [k]
            for one, side in ((a, NEXT), (b, PREVIOUS)):
                one._edges[side]._got -= idle
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


def send(peer: zmq.Socket[bytes], frames: Sequence[codec.Frame], scheme: str) -> None:
    """As a transport does: over tcp with a checksum."""
    peer.send_multipart([*frames, codec.checksum(frames)] if scheme == "tcp" else frames)


@pytest.mark.parametrize(
    "frames, reason, says",
    [
        ([b"garbage"], "malformed", "header"),
        ([b""], "malformed", "header"),
        ([b"\x80" * 5000], "malformed", "header: 5000 bytes"),
        ([*GOOD, b"more"], "malformed", "Checkpoint: 1 tensor frames"),
        ([b"x"] * 300_000, "too many frames", "frames from the previous stage, the limit is 6"),
    ],
    ids=["garbage", "empty", "long", "frames", "flood"],
)
def test_garbage_is_dropped_and_counted(
    zeromq: Zmq, frames: list[bytes], reason: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    b = zeromq.one()
    with bare_peer(zeromq, b) as peer:
        send(peer, frames, zeromq.scheme)
        send(peer, GOOD, zeromq.scheme)
        assert batches(b, PREVIOUS, 1) == [1]  # the garbage was taken whole, and does not count as a message
    assert b.dropped == {reason: 1} and says in caplog.text


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    tcp = Zmq("tcp", tmp_path)
    b = tcp.one()
    with contextlib.closing(b), bare_peer(tcp, b) as peer:
        sealed = [*GOOD, codec.checksum(GOOD)]
        for frame in range(len(sealed)):
            flipped = [bytearray(f) for f in sealed]
            flipped[frame][2] ^= 16
            peer.send_multipart(flipped)
        send(peer, GOOD, "tcp")
        assert batches(b, PREVIOUS, 1) == [1]
    assert b.dropped == {"damaged": 2}


def test_who_keeps_sending_garbage_is_cut_off(zeromq: Zmq) -> None:
    b = zeromq.one()
    with bare_peer(zeromq, b) as peer:
        for _ in range(BAD_LIMIT):
            peer.send(b"garbage")
        assert_lost(b, PREVIOUS, "keeps sending what is no message")
    assert sum(b.dropped.values()) == BAD_LIMIT


@pytest.mark.parametrize("numbers, says", [([0, 4], "3 messages of the previous"), ([0, 1, 0], "started again")])
def test_a_gap_is_a_lost_peer(zeromq: Zmq, numbers: list[int], says: str) -> None:
    b = zeromq.one()
    with bare_peer(zeromq, b) as peer:
        for number in numbers:
            send(peer, codec.encode(Checkpoint(number), "run", number), zeromq.scheme)
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
        (
            "tcp://192.0.2.1:*",
            r"can be reached by other machines.*`dnipipe keys new .*security\.private_network = true",
        ),
    ],
)
def test_addresses_that_are_refused(address: str, says: str) -> None:
    transport = ZmqTransport("run", queue=8, timeout=1, max_message=1000)
    with contextlib.closing(transport), pytest.raises(ConfigError, match=says):
        transport.listen(address)


def test_a_private_network_is_enough_to_listen_there() -> None:
    transport = ZmqTransport("run", queue=8, timeout=1, max_message=1000)
    with contextlib.closing(transport), pytest.raises(ConfigError, match=r"cannot listen on tcp://192\.0\.2\.1"):
        transport.listen("tcp://192.0.2.1:*", private=True)  # refused by the kernel alone: it is nobody's address


def test_a_socket_file_that_others_could_reach_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    transport = ZmqTransport("run", queue=8, timeout=1, max_message=1000)
    with contextlib.closing(transport), pytest.raises(ConfigError, match=r"by other users of this machine \(chmod 700"):
        transport.listen(f"ipc://{tmp_path}/socket")


def test_a_socket_file_in_use_is_refused(tmp_path: Path) -> None:
    factory = Zmq("ipc", tmp_path)
    one, other = factory.one(), factory.one()
    with contextlib.closing(one), contextlib.closing(other):
        one.listen(f"ipc://{tmp_path}/here")
        with pytest.raises(ConfigError, match="exists already"):
            other.listen(f"ipc://{tmp_path}/here")
        other.connect(f"ipc://{tmp_path}/here")


def test_closing_takes_away_ones_own_socket_file_and_no_newer_one(tmp_path: Path) -> None:
    """Who starts while an older process still closes may have its own file there by then."""
    file, factory = tmp_path / "here", Zmq("ipc", tmp_path)
    older = factory.one()
    with contextlib.closing(factory.one()) as newer:
        older.listen(f"ipc://{file}")
        file.unlink()
        newer.listen(f"ipc://{file}")
        older.close()
        assert file.is_socket()
    assert not file.exists()


def test_a_socket_file_is_ones_own_after_a_stranger_was_cut_off_too(tmp_path: Path) -> None:
    file = tmp_path / "here"
    with contextlib.closing(Zmq("ipc", tmp_path).one()) as one:
        one.listen(f"ipc://{file}")
        one._edges[NEXT].cut()  # which binds anew
        assert file.is_socket()
    assert not file.exists()


def test_stop_after_an_error_still_goes_out(zeromq: Zmq) -> None:
    """A stage that fails tells its neighbour why and closes at once, though the neighbour keeps sending."""
    a, b = zeromq.chain(capacity=64)
    for k in range(30):
        a.send(NEXT, Gradient(k, torch.zeros(2**14)))
    b.send(PREVIOUS, Stop(0, "stage 1: the loss is NaN"))
    b.close()
    assert isinstance(take(a, NEXT), Stop)
