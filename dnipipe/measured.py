"""A transport whose time is accounted for, and whose messages are written into the trace, if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from dnipipe.messages import Agreed, Hello, Link, Message, Received, Stop
from dnipipe.metrics import Clock
from dnipipe.tracing.writer import RECEIVED, SENT, Trace
from dnipipe.transport import AT_EASE, Side, Transport


class MeasuredTransport:
    """Stage `index`'s transport (see Transport); what it does is the clock's "send" and "receive"."""

    def __init__(self, inner: Transport, index: int, clock: Clock, trace: Trace | None = None) -> None:
        self.inner, self.index, self.clock, self.trace = inner, index, clock, trace

    def send(self, side: Side, message: Message) -> None:
        with self.clock.span("send"):
            self._note(SENT, side, message)  # before: it cannot be received earlier
            self.inner.send(side, message)

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        with self.clock.span("receive"):
            got = self.inner.receive(sides, timeout, waiting)
            if got:
                self._note(RECEIVED, *got)
            return got

    def _note(self, way: str, side: Side, message: Message) -> None:
        if self.trace and not isinstance(message, (Hello, Received, Stop, Link, Agreed)):  # no batch is theirs
            peer = self.index + (1 if side is Side.NEXT else -1)
            self.trace.message(way, peer, type(message).__name__, message.batch, self.clock.now())

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


__all__ = ["MeasuredTransport"]
