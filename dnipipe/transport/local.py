"""Stages in one process: for tests, for `dnipipe check`, and for a run of a single stage.

    pipeline(3):   transport 0 ──► transport 1 ──► transport 2        a deque for each direction of each edge,
                               ◄──             ◄──                    one condition variable for all of them

Messages travel by reference and are not checked. Each transport may have its own thread, or all may take turns in one.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from dnipipe.errors import PeerLost, WaitTimeout
from dnipipe.messages import Message
from dnipipe.transport import AT_EASE, Side


def pipeline(stages: int, capacity: int = 512, timeout: float = 120.0) -> list[LocalTransport]:
    """Connected transports. A queue takes `capacity` messages; a send to a full one waits up to `timeout` seconds."""
    changed = threading.Condition()  # its lock is reentrant, so that a signal handler may call wake()
    transports = [LocalTransport(k, capacity, timeout, changed) for k in range(stages)]
    for before, after in itertools.pairwise(transports):
        before.peers[Side.NEXT], after.peers[Side.PREVIOUS] = after, before
    return transports


class LocalTransport:
    """One stage's end of its edges (see Transport)."""

    def __init__(self, index: int, capacity: int, timeout: float, changed: threading.Condition) -> None:
        self.index, self.capacity, self.timeout = index, capacity, timeout
        self.peers: dict[Side, LocalTransport] = {}
        self._inbox: dict[Side, deque[Message]] = {side: deque() for side in Side}
        self._changed = changed
        self._woken = self._closed = False

    def send(self, side: Side, message: Message) -> None:
        """Raises PeerLost if that side is closed, WaitTimeout if its queue stays full."""
        peer = self.peers[side]
        queue = peer._inbox[Side.PREVIOUS if side is Side.NEXT else Side.NEXT]
        with self._changed:
            if not self._changed.wait_for(lambda: peer._closed or len(queue) < self.capacity, self.timeout):
                raise WaitTimeout(
                    f"stage {self.index} waited {self.timeout:g} s to send batch {getattr(message, 'batch', None)} to "
                    f"stage {peer.index}, whose queue of {self.capacity} messages stayed full"
                )
            if peer._closed:
                raise PeerLost(f"stage {peer.index}, the {side.value} of stage {self.index}, has closed")
            queue.append(detached(message))
            self._changed.notify_all()

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        """The next message, None after `timeout` or a wake. Raises PeerLost after a closed side's last message."""
        with self._changed:
            if timeout > 0 and not self._woken and not any(map(self._ready, sides)):
                with waiting:
                    self._changed.wait_for(lambda: self._woken or any(map(self._ready, sides)), timeout)
            if self._woken:
                self._woken = False
                return None
            for side in sides:
                if self._inbox[side]:
                    self._changed.notify_all()
                    return side, self._inbox[side].popleft()
            for side in sides:
                if self._ready(side):
                    raise PeerLost(
                        f"stage {self.peers[side].index}, the {side.value} of stage {self.index}, has closed"
                    )
            return None

    def _ready(self, side: Side) -> bool:
        return bool(self._inbox[side]) or (side in self.peers and self.peers[side]._closed)

    def wake(self) -> None:
        """Make a `receive` that waits, or the next one, return None at once."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """What was sent stays with the neighbours; what came and was not received is gone."""
        with self._changed:
            self._closed = True
            for queue in self._inbox.values():
                queue.clear()
            self._changed.notify_all()


def detached(message: Message) -> Message:
    changes: dict[str, Any] = {
        name: value.detach()
        for name, value in vars(message).items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    return replace(message, **changes) if changes else message
