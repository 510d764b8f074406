"""A neighbour with the right key that writes a message byte by byte: only its own edge waits for it, and for a while.

stage 0 ◄──────► stage 1 ◄── a byte at a time ── stage 2
"""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
import torch

from benchmarks.relay import Passed, Relay
from dnipipe.errors import PeerLost
from dnipipe.keys import KeyRing
from dnipipe.messages import Checkpoint, Gradient
from dnipipe.transport import limits, line
from dnipipe.transport import zmq as zeromq
from dnipipe.transport.arriving import TELLS
from dnipipe.transport.zmq import ZmqTransport
from tests.security.conftest import Party
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, batches

MB = 2**20


class Dripper(Relay):
    """A relay that, once it is `slow`, hands on a piece a millisecond to its target."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.over, self.dripped = Event(), Event(), 0
        self.piece = 1  # bytes

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
                for k in range(0, len(data), self.piece):
                    target.sendall(data[k : k + self.piece])
                    self.dripped += self.piece
                    if self.over.wait(0.001):
                        return


@pytest.fixture
def dripper() -> Iterator[Dripper]:
    with Dripper() as made:
        yield made
        made.over.set()


Three = tuple[ZmqTransport, ZmqTransport, ZmqTransport]


def three(party: Party, dripper: Dripper, locked: bool, megabytes: int = 64) -> Three:
    """The stages; stage 2 has begun a message of so many MB, which byte by byte takes hours."""
    made = [party.one(KeyRing(party.at(k), k) if locked else None, WAIT, 128 * MB) for k in range(3)]
    first, middle, last = made
    middle.connect(first.listen("tcp://127.0.0.1:*"))
    last.connect(dripper.start(middle.listen("tcp://127.0.0.1:*")))
    last.send(PREVIOUS, Checkpoint(1))
    assert batches(middle, NEXT, 1) == [1]
    dripper.slow.set()
    last.send(PREVIOUS, Gradient(2, torch.ones(megabytes * MB // 4)))
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


@pytest.mark.skipif(not TELLS, reason="elsewhere a frame must be whole within the limit of a heartbeat")
@LOCKED
def test_a_frame_may_take_longer_than_signs_of_life(
    party: Party, dripper: Dripper, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand behind it, and what has come of it stands for them."""
    for module in (limits, zeromq):
        monkeypatch.setattr(module, "STILL", 1)
    dripper.piece = 400
    _, middle, _ = three(party, dripper, locked, megabytes=1)
    began = time.monotonic()
    got = middle.receive([NEXT], 6 * WAIT)
    assert got and isinstance(got[1], Gradient) and got[1].batch == 2
    assert time.monotonic() - began > 2 * limits.STILL


@LOCKED
def test_a_connection_that_breaks_within_a_message_is_not_waited_for(
    party: Party, dripper: Dripper, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was lost with it shows by no gap, for who waits for it says nothing more; and no other edge is touched."""
    monkeypatch.setitem(line.GRACE, "tcp", WAIT)
    dripper.piece = 200
    first, middle, _ = three(party, dripper, locked)
    while not middle._edges[NEXT].hears(0.0, WAIT):
        assert middle.receive([NEXT], 0.1) is None
    dripper.cut()
    with pytest.raises(PeerLost, match=r"the next stage is gone: .* connection broke within a message"):
        assert middle.receive([NEXT], WAIT) is None
    first.send(NEXT, Checkpoint(1))
    assert batches(middle, PREVIOUS, 1) == [1]
