"""Mutants, sent by a neighbour over a socket, to a transport as a stage holds it: nothing but PeerLost may escape.

neighbour, a bare socket ── mutant, mutant, … a good message ──► the transport: it takes the good one, counts the rest
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator

import torch
import zmq

from benchmarks.fuzz.mutants import RUN, Mutants
from dnipipe import codec
from dnipipe.config import WireSettings
from dnipipe.errors import PeerLost
from dnipipe.expected import expected
from dnipipe.messages import Checkpoint
from dnipipe.split import Plan
from dnipipe.transport import Side
from dnipipe.transport.zmq import ZmqTransport

BETWEEN = 10  # mutants between two good messages
LIMIT = 60.0  # seconds for one message to arrive; only a failure waits so long
GOOD = 10**9  # batch id of a good message
PLAN = Plan(
    layers=("0", "1"),
    boundaries=(1,),
    seconds=(1.0, 1.0),
    parameters=(1, 1),
    shapes=((8, 4), (8, 3)),
    dtypes=("float32", "float32"),
    x=(8, 5),
    x_dtype="float32",
    y=(8,),
    classes=3,
)


def frames(count: int, seed: int) -> Iterator[Counter[str]]:
    """What came of each next part of `count` mutants. Raises AssertionError if a good message was not delivered."""
    mutants, left = Mutants(seed), count
    torch.manual_seed(seed)
    while left > 0:
        found: Counter[str] = Counter()
        with _connected() as (peer, transport):
            sent = 0
            with contextlib.suppress(PeerLost):
                while left > 0 and sent < 20_000:
                    part = min(BETWEEN, left)
                    number = transport._edges[Side.PREVIOUS].received
                    for _ in range(part):
                        peer.send_multipart(mutants.next(number))
                    sent, left = sent + part, left - part
                    _taken(transport, found, sent)
                    _good(peer, transport, found)
            found |= transport.dropped
            lost = transport._edges[Side.PREVIOUS].lost
            found[f"edge lost: {_kind(lost)}"] += bool(lost)
        found["unread behind a lost edge"] += max(0, sent - found["taken"] - transport.dropped.total()) if lost else 0
        yield found


@contextlib.contextmanager
def _connected() -> Iterator[tuple[zmq.Socket[bytes], ZmqTransport]]:
    """A bare socket in the place of stage 0, and stage 1's transport."""
    fits = expected(PLAN, WireSettings(), 1)
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 1000  # ms; 0 can abort the process, as in transport/edge.py
        peer.bind(f"ipc://{folder}/edge")
        transport = ZmqTransport(RUN, queue=512, timeout=LIMIT, max_message=2**20, fits=fits)
        transport.connect(f"ipc://{folder}/edge")
        try:
            yield peer, transport
        finally:
            transport.close()


def _taken(transport: ZmqTransport, found: Counter[str], sent: int) -> None:
    """Until each of `sent` mutants is counted: taken for a message, or dropped. Raises PeerLost."""
    deadline = time.monotonic() + LIMIT
    while found["taken"] + transport.dropped.total() < sent:
        found["taken"] += transport.receive([Side.PREVIOUS], 0.001) is not None  # soon: what is dropped wakes nobody
        if time.monotonic() > deadline:
            raise AssertionError(f"of {sent} frames {found['taken']} were taken, {dict(transport.dropped)} dropped")


def _good(peer: zmq.Socket[bytes], transport: ZmqTransport, found: Counter[str]) -> None:
    number = transport._edges[Side.PREVIOUS].received
    peer.send_multipart(codec.encode(Checkpoint(GOOD), RUN, number))
    got = transport.receive([Side.PREVIOUS], LIMIT)
    assert got is not None and isinstance(got[1], Checkpoint) and got[1].batch == GOOD, got
    found["good ones between, all delivered"] += 1


def _kind(lost: str) -> str:
    return next((kind for kind in ("lost on the way", "started again", "keeps sending") if kind in lost), "other")
