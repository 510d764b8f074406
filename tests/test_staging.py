"""Messages that leave when their tensors are made: in order, none lost, and the stage goes on meanwhile.

held: [h 7] [g 7] ──► inner        a device that is done when the test says so
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dnipipe.errors import PeerLost, WaitTimeout
from dnipipe.messages import Activation, Answer, Checkpoint, Gradient, Message, Report, Stop
from dnipipe.staging import MOST, StagedTransport
from dnipipe.transport import Side, Transport
from dnipipe.transport.local import pipeline

NEXT, PREVIOUS = Side.NEXT, Side.PREVIOUS
THERE = torch.device("meta")


class Slow:
    """A device that has done `done` of the things it was asked to take; to wait for one makes it do it."""

    device = THERE

    def __init__(self) -> None:
        self.asked = self.done = self.waits = 0

    def take(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def mark(self, taken: bool = True) -> Callable[[bool], bool]:
        self.asked += 1
        mine = self.asked

        def done(wait: bool) -> bool:
            if wait:
                self.waits += 1
                self.done = max(self.done, mine)
            return self.done >= mine

        return done


def h(batch: int) -> Activation:
    return Activation(batch, torch.empty(2, 3, device=THERE), torch.tensor([0, 1]))


@pytest.fixture
def around() -> tuple[StagedTransport, Slow, Callable[[], list[Message]]]:
    """The staged end, its device, and what has come out at the other end."""
    near, far = pipeline(2, capacity=64, timeout=5.0)
    slow = Slow()

    def came() -> list[Message]:
        found = []
        while got := far.receive([PREVIOUS], 0.0):
            found.append(got[1])
        return found

    return StagedTransport(near, slow), slow, came


Around = tuple[StagedTransport, Slow, Callable[[], list[Message]]]


def test_what_needs_no_device_goes_at_once(around: Around) -> None:
    staged, slow, came = around
    staged.send(NEXT, Checkpoint(3))
    staged.send(NEXT, Activation(4, torch.ones(2), torch.ones(1)))
    assert [type(message) for message in came()] == [Checkpoint, Activation]
    assert slow.asked == 0


def test_a_message_is_held_until_its_tensors_are_there(around: Around) -> None:
    staged, slow, came = around
    staged.send(NEXT, h(1))
    staged.send(NEXT, h(2))
    assert came() == [] and slow.waits == 0
    slow.done = 1
    staged.send(NEXT, h(3))
    (first,) = came()
    assert isinstance(first, Activation) and first.batch == 1
    assert first.x.device.type == "cpu" and torch.equal(first.x, torch.zeros(2, 3))
    assert slow.waits == 0


def test_a_gradient_of_nothing_keeps_its_place(around: Around) -> None:
    staged, slow, came = around
    staged.send(NEXT, h(1))
    staged.send(NEXT, Gradient(2, None))
    assert came() == []
    slow.done = 2
    staged.receive([NEXT], 0.0)
    assert [message.batch for message in came()] == [1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("last", [Stop(2), Report(0, 2, final=True), Checkpoint(2)])
def test_last_words_take_everything_along(around: Around, last: Message) -> None:
    """Nothing is sent behind them, so nothing may stay behind."""
    staged, _, came = around
    staged.send(NEXT, h(1))
    staged.send(NEXT, h(2))
    staged.send(NEXT, last)
    assert [type(message) for message in came()] == [Activation, Activation, type(last)]


def test_no_more_than_so_many_are_held(around: Around) -> None:
    staged, slow, came = around
    for batch in range(1, MOST + 1):
        staged.send(NEXT, h(batch))
    assert slow.waits == 0
    staged.send(NEXT, h(MOST + 1))
    assert [message.batch for message in came()] == [1] and slow.waits == 1  # type: ignore[union-attr]


def test_what_has_come_is_handed_out_before_the_device_is_waited_for() -> None:
    near, far = pipeline(2, capacity=8, timeout=5.0)
    slow = Slow()
    staged = StagedTransport(near, slow)
    staged.send(NEXT, h(1))
    far.send(PREVIOUS, Gradient(9, None))
    got = staged.receive([NEXT], 5.0)
    assert got is not None and isinstance(got[1], Gradient) and slow.waits == 0
    assert staged.receive([NEXT], 0.01) is None and slow.waits == 1  # nothing else to do: waits, sends, then listens
    assert isinstance((far.receive([PREVIOUS], 0.0) or (None, None))[1], Activation)


def test_to_look_is_not_to_wait() -> None:
    """Stage 0 looks for gradients with a timeout of 0 before it draws a batch."""
    near, _ = pipeline(2, capacity=8, timeout=5.0)
    slow = Slow()
    staged = StagedTransport(near, slow)
    staged.send(NEXT, h(1))
    assert staged.receive([NEXT], 0.0) is None and slow.waits == 0


def test_a_message_that_found_no_room_is_not_lost() -> None:
    near, far = pipeline(2, capacity=1, timeout=0.05)
    slow = Slow()
    staged = StagedTransport(near, slow)
    for batch in (1, 2):
        staged.send(NEXT, h(batch))
    slow.done = 2
    with pytest.raises(WaitTimeout):
        staged.send(NEXT, Checkpoint(2))  # 1 goes, 2 finds the queue full
    assert batches(far) == [1]
    staged.send(NEXT, h(3))
    assert batches(far) == [2]


def test_who_is_gone_keeps_nobody_else_waiting() -> None:
    """Its last words are heard, the other side is told, and only then it is what ends the wait."""
    a, b, c = pipeline(3, capacity=8, timeout=5.0)
    slow = Slow()
    staged = StagedTransport(b, slow)
    for batch in range(1, 4):
        staged.send(NEXT, h(batch))
    c.send(PREVIOUS, Stop(3, "why it ends"))
    c.close()
    slow.done = 3
    got = staged.receive([NEXT], 5.0)
    assert got is not None and isinstance(got[1], Stop)
    staged.send(PREVIOUS, Stop(3, "stage 2: why it ends"))
    assert isinstance((a.receive([NEXT], 0.0) or (None, None))[1], Stop)
    with pytest.raises(PeerLost):
        staged.receive([NEXT], 5.0)
    with pytest.raises(PeerLost):
        staged.send(NEXT, h(4))
        staged.send(NEXT, Checkpoint(4))


def batches(far: Transport) -> list[int]:
    found = []
    while got := far.receive([PREVIOUS], 0.0):
        found.append(got[1].batch)  # type: ignore[union-attr]
    return found


def test_what_is_sent_from_the_device_is_not_copied() -> None:
    near, far = pipeline(2, capacity=8, timeout=5.0)
    slow = Slow()
    staged = StagedTransport(near, slow, direct=True)
    staged.send(NEXT, h(1))
    assert far.receive([PREVIOUS], 0.0) is None
    slow.done = 1
    staged.receive([NEXT], 0.0)
    got = far.receive([PREVIOUS], 0.0)
    assert got is not None and isinstance(got[1], Activation) and got[1].x.device == THERE


def test_an_answer_is_taken_along_too(around: Around) -> None:
    staged, slow, came = around
    staged.send(NEXT, Answer(1, torch.empty(4, dtype=torch.float64, device=THERE)))
    slow.done = 1
    staged.receive([NEXT], 0.0)
    (answer,) = came()
    assert isinstance(answer, Answer) and answer.h.device.type == "cpu"
