"""A stage's two edges: which transport has them, where it listens, and what it connects to.

stage k ── listens, publishes its endpoint ◄── connects ── stage k+1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dnipipe.building import beside_of
from dnipipe.config import Config
from dnipipe.expected import expected
from dnipipe.keys import KeyRing
from dnipipe.metrics import StageMetrics
from dnipipe.rendezvous import Rendezvous
from dnipipe.split import Plan
from dnipipe.transport import Side, Transport, gloo, nccl
from dnipipe.transport.apart import choose_interface
from dnipipe.transport.gloo import GlooTransport
from dnipipe.transport.local import pipeline
from dnipipe.transport.nccl import NcclTransport, check_nccl
from dnipipe.transport.zmq import ZmqTransport

QUEUE = 512  # messages that may wait on an edge, each way: a window has 256 batches at most; and there are markers


@contextmanager
def opened(
    meeting: Rendezvous, settings: Config, run: str, plan: Plan, sockets: Path, measured: StageMetrics
) -> Iterator[Transport]:
    """It binds the edge to the next stage, and connects to the one before. `sockets`: where socket files go."""
    if meeting.world == 1:
        yield pipeline(1, capacity=1, timeout=settings.transport.timeout)[0]
        return
    names = {Side.PREVIOUS: f"stage {meeting.rank - 1}", Side.NEXT: f"stage {meeting.rank + 1}"}
    transport = _kind_of(settings, meeting.machines)(
        run,
        **edges_of(settings, meeting.rank),
        names=names,
        fits=expected(plan, settings.wire, meeting.rank),
        packing=measured.clock.span("serialize"),
        full=measured.clock.span("wait_send"),
    )
    measured.dropped = transport.dropped
    try:
        if meeting.rank < meeting.world - 1:
            private = settings.security.private_network
            address = meeting.address(settings.transport.scheme, settings.transport.address, sockets)
            meeting.publish(f"endpoint/{meeting.rank}", f"made {transport.listen(address, private)}")
        if meeting.rank > 0:
            transport.connect(meeting.made(f"endpoint/{meeting.rank - 1}", meeting.rank - 1))
        yield transport
    finally:
        transport.close()


def _kind_of(settings: Config, machines: int) -> Callable[..., ZmqTransport]:
    """What makes the transport, called as ZmqTransport is. Raises ConfigError."""
    kind, private = settings.transport.kind, settings.security.private_network
    if kind == "gloo":
        choose_interface(gloo.INTERFACE, kind, machines, private)
        return GlooTransport
    if kind == "nccl":
        lines = beside_of(settings)
        check_nccl(lines.device)
        choose_interface(nccl.INTERFACE, kind, machines, private)
        return partial(NcclTransport, lines=lines)
    return ZmqTransport


def edges_of(settings: Config, stage: int) -> dict[str, Any]:
    """What the settings say of a stage's edges, as ZmqTransport takes it."""
    return {
        "queue": QUEUE,
        "timeout": settings.transport.timeout,
        "max_message": settings.transport.max_message * 2**20,
        "ring": KeyRing.of(settings.security.keys, stage),
        "spare": settings.wire.gradient_queue,
    }


def edges(meeting: Rendezvous) -> dict[Side, int]:
    """This stage's edges, each with the index of its first stage; that of the stage before comes first."""
    both = {Side.PREVIOUS: meeting.rank - 1, Side.NEXT: meeting.rank}
    return {side: lower for side, lower in both.items() if 0 <= lower < meeting.world - 1}


__all__ = ["edges", "edges_of", "opened"]
