"""How messages travel between a stage and its two neighbours.

A transport is what one stage holds: it knows at most two sides, the stage before and the stage after.
Promises, the same for every transport (tests/transport/test_contract.py holds each to them):
  - messages of one side arrive in the order they were sent, each once, or PeerLost is raised: never a silent gap;
  - what was sent before an orderly close arrives; only then does the side count as lost;
  - no call waits longer than its limit (where tensors travel apart from their message, gloo.py, two limits may add up);
  - a tensor may be sent without a copy: nothing writes to it after send.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Protocol

from dnipipe.messages import Message


class Side(Enum):
    """A direction, seen from one stage."""

    PREVIOUS = "previous"  # stage k-1: activations come from it, gradients go to it
    NEXT = "next"  # stage k+1: activations go to it, gradients come from it


AT_EASE = nullcontext()  # for a wait that nobody measures


class Transport(Protocol):
    """One stage's end of its edges. One thread owns it; only `wake` may be called from elsewhere."""

    def send(self, side: Side, message: Message) -> None:
        """Hand a message over; the neighbour may not have it yet.

        Raises PeerLost if that side is gone, WaitTimeout if its queue stays full for the transport's own limit.
        """

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        """The next message from one of `sides`; of several that are ready, from the side named first.

        While there is nothing to do but wait, it is within `waiting`, so that its owner can tell idle time from work.
        Waits at most `timeout` seconds (0: only looks) and then, or when woken, returns None. Raises PeerLost if one
        of `sides` is gone and all it sent has been received, MessageError if what came is not a message.
        """

    def wake(self) -> None:
        """Make a `receive` that waits, or the next one, return None at once. Safe in a signal handler."""

    def close(self) -> None:
        """Deliver what was sent (for a limited time), then let go of every socket and file. May be called twice."""
