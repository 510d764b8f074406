"""A transport whose messages leave when the GPU has made them, while the stage goes on giving it work.

    send(h 7) ─► copy under way ─► … ─► there ─► inner.send(h 7)          in the order of the calls
                                                   │
                                    asked at each call, and waited for when nothing has come that could be done

Without it, a send would wait for the GPU to be done with all it was told, and the GPU then for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dnipipe.beside import Done
from dnipipe.messages import Gradient, Message
from dnipipe.transport import AT_EASE, Side, Transport

MOST = 8  # messages that may be held back: of some two batches; then a send waits for the oldest


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
        self._held: deque[tuple[Side, Message, Done]] = deque()

    def send(self, side: Side, message: Message) -> None:
        """As the inner one's, of which an error may concern a message before this one."""
        staged = {name: tensor for name, tensor in _tensors(message).items() if tensor.device == self.copies.device}
        if not staged and not (self._held and isinstance(message, Gradient)):  # a Gradient may be without one
            self._let_go(0)  # so a stage that ends, with Stop or its last Report, leaves nothing behind
            self.inner.send(side, message)
            return
        if staged and not self.direct:
            taken: dict[str, Any] = {name: self.copies.take(tensor) for name, tensor in staged.items()}
            message = replace(message, **taken)
        self._held.append((side, message, self.copies.mark(taken=not self.direct)))
        self._let_go(MOST)

    def _let_go(self, most: int) -> None:
        """Send on what is there; wait for as much as there is more than `most` of. Nothing is lost by an error."""
        while self._held:
            side, message, done = self._held[0]
            if not done(False):
                if len(self._held) <= most:
                    return
                with self.busy:
                    done(True)
            self._held.popleft()
            self.inner.send(side, message)

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        self._let_go(MOST)
        while self._held:
            if got := self.inner.receive(sides, 0.0):
                return got
            self._let_go(len(self._held) - 1)
        return self.inner.receive(sides, timeout, waiting)

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


def _tensors(message: Message) -> dict[str, Tensor]:
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


__all__ = ["StagedTransport"]
