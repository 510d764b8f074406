"""Gradients that give way: what waits for a link that is full, in the queue itself and over ZeroMQ."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.fuzz.targets import alike
from dnipipe.errors import PeerLost, WaitTimeout
from dnipipe.messages import Answer, Gradient, Message, Saved, Stop
from dnipipe.transport.backlog import Backlog
from dnipipe.transport.zmq import ZmqTransport
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, Zmq, take

LARGE = torch.arange(2**18, dtype=torch.float32)  # 1 MiB: a few fill every buffer of a connection
MANY = 60  # of them are more than all its buffers and queues hold


def pair(zeromq: Zmq, spare: int = 2, queue: int = 8, timeout: float = WAIT) -> tuple[ZmqTransport, ZmqTransport]:
    """(the stage before, the one whose gradients may wait)."""
    a, b = zeromq.one(), zeromq.one(spare=spare, queue=queue, timeout=timeout)
    b.connect(a.listen(zeromq.address()))
    b.send(PREVIOUS, Saved(0, 1))
    take(a, NEXT)
    return a, b


def drained(backlog: Backlog) -> list[Message]:
    return [backlog.popleft() for _ in range(len(backlog))]


def test_the_oldest_gradient_is_left_out_and_its_answer_is_not() -> None:
    backlog, g, scale = Backlog(2), torch.ones(3), torch.ones(1)
    said: list[Message] = [Gradient(7, g, starved=True, scale=scale), Gradient(8, None), Answer(1, g), Gradient(9, g)]
    said += [Saved(9, 2), Gradient(10, g)]
    for message in said:
        backlog.append(message)
    got = drained(backlog)
    assert alike(got[0], Gradient(7, None, starved=True, full=True))
    for one, other in zip(got[1:], said[1:], strict=True):
        assert one is other


def test_what_has_gone_makes_room_for_another() -> None:
    backlog, g = Backlog(1), torch.ones(3)
    backlog.append(Gradient(1, g))
    backlog.popleft()
    backlog.append(Gradient(2, g))
    assert [message.full for message in drained(backlog) if isinstance(message, Gradient)] == [False]
    backlog.append(Gradient(3, g))
    backlog.clear()
    backlog.append(Gradient(4, g))
    assert alike(*drained(backlog), Gradient(4, g))


def test_a_slow_reader_gets_every_answer_in_order_and_of_the_gradients_the_newest(zeromq: Zmq) -> None:
    a, b = pair(zeromq, queue=MANY)
    for batch in range(1, MANY + 1):
        b.send(PREVIOUS, Gradient(batch, LARGE + batch))  # nobody reads, and nothing waits
    b.send(PREVIOUS, Stop(MANY))
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(b.receive, [PREVIOUS], WAIT)  # in which what waits goes on, while there is nothing to get
        got = [take(a, NEXT) for _ in range(MANY + 1)]
        b.wake()
        assert busy.result() is None
    gradients = [message for message in got if isinstance(message, Gradient)]
    assert [message.batch for message in gradients] == list(range(1, MANY + 1)) and isinstance(got[-1], Stop)
    whole = [message.batch for message in gradients if message.g is not None]
    assert whole[-2:] == [MANY - 1, MANY] and whole[0] == 1  # in the queue, and under way
    assert all(message.full == (message.g is None) for message in gradients) and len(whole) < MANY - 10
    assert all(torch.equal(message.g, LARGE + message.batch) for message in gradients if message.g is not None)


def test_a_reader_that_keeps_up_gets_every_gradient(zeromq: Zmq) -> None:
    a, b = pair(zeromq, spare=1)
    for batch in range(1, MANY + 1):
        b.send(PREVIOUS, Gradient(batch, LARGE))
        while (got := a.receive([NEXT], 0.01)) is None:
            b.receive([PREVIOUS], 0)
        assert alike(got[1], Gradient(batch, LARGE))


def test_without_the_setting_a_gradient_waits_for_room(zeromq: Zmq) -> None:
    _, b = pair(zeromq, spare=0, timeout=0.2)
    with pytest.raises(WaitTimeout, match="to send a Gradient of batch"):
        for batch in range(MANY):
            b.send(PREVIOUS, Gradient(batch, LARGE))


def test_answers_wait_up_to_the_queues_limit(zeromq: Zmq) -> None:
    _, b = pair(zeromq, queue=4, timeout=0.2)
    with pytest.raises(WaitTimeout, match=r"0.2 s .* to send a Gradient of batch"):
        for batch in range(50 * MANY):
            b.send(PREVIOUS, Gradient(batch, LARGE))


def test_what_waits_is_delivered_by_close(zeromq: Zmq) -> None:
    a, b = pair(zeromq, queue=MANY)
    for batch in range(1, MANY + 1):
        b.send(PREVIOUS, Gradient(batch, LARGE))
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(b.close)
        got = [take(a, NEXT) for _ in range(MANY)]
        closing.result()
    assert [message.batch for message in got if isinstance(message, Gradient)] == list(range(1, MANY + 1))


def test_a_neighbour_that_goes_is_lost_whatever_waits(zeromq: Zmq) -> None:
    a, b = pair(zeromq, queue=MANY)
    for batch in range(1, MANY + 1):
        b.send(PREVIOUS, Gradient(batch, LARGE))
    a.close()
    with pytest.raises(PeerLost):
        b.receive([PREVIOUS], WAIT)
    b.close()
