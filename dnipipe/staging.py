"""A transport whose messages leave when the GPU has made them, while the stage goes on giving it work.

    send(h 7) ─► copy under way ─► … ─► there ─► inner.send(h 7)          in the order of the calls
                                                   │
                                    asked at each call, and waited for when nothing has come that could be done

Without it, a send would wait for the GPU to be done with all it was told, and the GPU then for the host.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dnipipe.beside import Done
from dnipipe.errors import PeerLost
from dnipipe.messages import Gradient, Message
from dnipipe.transport import AT_EASE, Side, Transport

MOST = 8  # messages to a side that may be held back; then a send waits for the oldest


class Copies(Protocol):
    """How tensors leave a device (beside.py)."""

    device: torch.device

    def take(self, tensor: Tensor) -> Tensor: ...

    def mark(self, taken: bool = True) -> Done: ...


class StagedTransport:
    """A Transport (see there) in front of another, for a stage on a GPU.

    Args:
        inner: what carries the messages.
        copies: takes tensors to the main memory.
        direct: `inner` sends them from the GPU itself, once they are made (nccl.py), so none is copied.
        busy: within this the host waits for the GPU.
    """

    def __init__(
        self, inner: Transport, copies: Copies, direct: bool = False, busy: AbstractContextManager[object] = AT_EASE
    ) -> None:
        self.inner, self.copies, self.direct, self.busy = inner, copies, direct, busy
        self._held: dict[Side, deque[tuple[int, Message, Done]]] = {side: deque() for side in Side}
        self._number = itertools.count()

    def send(self, side: Side, message: Message) -> None:
        """Raises as the inner one's does, perhaps for a message to that side before this one; this one is not taken."""
        held = self._held[side]
        staged = {name: tensor for name, tensor in _tensors(message).items() if tensor.device == self.copies.device}
        if not staged and not (held and isinstance(message, Gradient)):  # a Gradient may be without one
            self._let_go(side, 0)  # so a stage that ends, with Stop or its last Report, leaves nothing behind
            self.inner.send(side, message)
            return
        if staged and not self.direct:
            taken: dict[str, Any] = {name: self.copies.take(tensor) for name, tensor in staged.items()}
            message = replace(message, **taken)
        done = self.copies.mark(taken=not self.direct)
        self._let_go(side, MOST - 1)
        if not held and done(False):
            self.inner.send(side, message)
        else:
            held.append((next(self._number), message, done))

    def _let_go(self, side: Side, most: int) -> None:
        """Send on what is there; wait for as much as there is more than `most` of. Who is gone gets nothing more."""
        held = self._held[side]
        while held:
            _, message, done = held[0]
            if not done(False):
                if len(held) <= most:
                    return
                with self.busy:
                    done(True)
            try:
                self.inner.send(side, message)
            except PeerLost:
                held.clear()
                raise
            held.popleft()

    def _try(self, side: Side, most: int) -> None:
        """The same for `receive`, which first hands out what a neighbour said before it went, and then says that."""
        with contextlib.suppress(PeerLost):
            self._let_go(side, most)

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        """With a timeout of 0 it does not wait for the GPU either."""
        for side in Side:
            self._try(side, MOST)
        while timeout > 0 and (full := [side for side in Side if self._held[side]]):
            if got := self.inner.receive(sides, 0.0):
                return got
            oldest = min(full, key=lambda side: self._held[side][0][0])
            self._try(oldest, len(self._held[oldest]) - 1)
        return self.inner.receive(sides, timeout, waiting)

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


def _tensors(message: Message) -> dict[str, Tensor]:
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


__all__ = ["StagedTransport"]
