"""A neighbour with the right key that writes a message byte by byte: only its own edge waits for it, and for a while.

stage 0 ◄──────► stage 1 ◄── a byte at a time ── stage 2
"""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
import zmq

from benchmarks.relay import Passed, Relay
from dnipipe.errors import PeerLost
from dnipipe.keys import KeyRing
from dnipipe.messages import Checkpoint, Gradient
from dnipipe.transport import edge
from dnipipe.transport.zmq import ZmqTransport
from tests.security.conftest import Party
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, batches

MB = 2**20


class Dripper(Relay):
    """A relay that, once it is `slow`, hands on a byte a millisecond to its target."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.over, self.dripped = Event(), Event(), 0

    def _way(self, forth: bool) -> Passed:
        return bytearray if forth else bytes  # the same either way: by which `_pump` knows what goes to the target

    def _pump(self, source: socket.socket, target: socket.socket, way: Passed) -> None:
        if way is bytes:
            super()._pump(source, target, way)
            return
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.slow.is_set():
                    target.sendall(data)
                    continue
                for byte in data:
                    target.sendall(bytes([byte]))
                    self.dripped += 1
                    if self.over.wait(0.001):
                        return


@pytest.fixture
def dripper() -> Iterator[Dripper]:
    with Dripper() as made:
        yield made
        made.over.set()


Three = tuple[ZmqTransport, ZmqTransport, ZmqTransport]


def three(party: Party, dripper: Dripper, locked: bool) -> Three:
    """The stages; stage 2 has begun a message of 64 MB that will take the whole day."""
    made = [party.one(KeyRing(party.at(k), k) if locked else None, WAIT, 128 * MB) for k in range(3)]
    first, middle, last = made
    middle.connect(first.listen("tcp://127.0.0.1:*"))
    last.connect(dripper.start(middle.listen("tcp://127.0.0.1:*")))
    last.send(PREVIOUS, Checkpoint(1))
    assert batches(middle, NEXT, 1) == [1]
    dripper.slow.set()
    last.send(PREVIOUS, Gradient(2, torch.ones(16 * MB)))
    return first, middle, last


LOCKED = pytest.mark.parametrize("locked", [True, False], ids=["with keys", "without"])


def memory() -> int:
    """Bytes that this process has in the main memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@LOCKED
def test_who_writes_byte_by_byte_holds_up_nobody_and_holds_no_memory(
    party: Party, dripper: Dripper, locked: bool
) -> None:
    first, middle, last = three(party, dripper, locked)
    gc.collect()
    before = memory()
    for k in range(1, 1000):
        first.send(NEXT, Checkpoint(k))
        assert batches(middle, PREVIOUS, 1) == [k]
        middle.send(NEXT, Checkpoint(k))  # the other way, to the slow one itself
        assert batches(last, PREVIOUS, 1) == [k]
        assert middle.receive([NEXT], 0.0) is None
        if dripper.dripped > 1000:  # its header has come, and how long the tensor is
            break
        dripper.over.wait(0.01)
    assert 1000 < dripper.dripped < MB and memory() - before < 16 * MB


@LOCKED
def test_a_frame_that_takes_too_long_costs_the_connection(
    party: Party, dripper: Dripper, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat that is asked for stands behind it. After 11 s; here sooner. And no other is waited for: who waits
    for what was lost with it is told at once, and why.
    """
    table: Callable[..., dict[zmq.SocketOption, int]] = edge.options
    soon = {zmq.HEARTBEAT_IVL: 100, zmq.HEARTBEAT_TIMEOUT: 3000}
    monkeypatch.setattr(edge, "options", lambda *settings: table(*settings) | soon)
    monkeypatch.setitem(edge.GRACE, "tcp", WAIT)
    first, middle, _ = three(party, dripper, locked)
    with pytest.raises(PeerLost, match=r"the next stage is gone: .* more than 3 s on this link needs smaller batches"):
        assert middle.receive([NEXT], WAIT) is None
    assert dripper.dripped < MB
    first.send(NEXT, Checkpoint(1))
    assert batches(middle, PREVIOUS, 1) == [1]
