"""One contract, every transport: order, no silent gap, no wait without a limit, nothing left behind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.fuzz.targets import alike
from dnipipe.errors import PeerLost, WaitTimeout
from dnipipe.messages import Activation, Answer, Checkpoint, Evaluation, Gradient, Input, Stop
from dnipipe.transport import Side, Transport
from dnipipe.transport.zmq import ZmqTransport
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, Make, assert_lost, batches, take


def test_order_and_both_directions(chain: Make) -> None:
    a, b = chain(capacity=64)
    for k in range(50):
        a.send(NEXT, Checkpoint(k))
        b.send(PREVIOUS, Checkpoint(100 + k))
    assert batches(b, PREVIOUS, 50) == list(range(50))
    assert batches(a, NEXT, 50) == list(range(100, 150))


def test_both_directions_from_two_threads(chain: Make) -> None:
    a, b = chain(capacity=4)

    def talk(mine: Transport, side: Side) -> list[int]:
        heard = []
        for k in range(200):
            mine.send(side, Gradient(k, torch.full((64, 1024), float(k))))
            message = take(mine, side)
            assert isinstance(message, Gradient) and message.g is not None and bool((message.g == message.batch).all())
            heard.append(message.batch)
        return heard

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(talk, a, NEXT), pool.submit(talk, b, PREVIOUS)]
        assert [result.result() for result in results] == [list(range(200))] * 2


TENSORS = {
    "large": torch.arange(2**21, dtype=torch.float32),  # 8 MB
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(3.5),
    "bfloat16": torch.randn(5, 7).bfloat16(),
    "float16": torch.randn(5, 7).half(),
    "int64": torch.tensor([2**62, -(2**62)]),
    "bool": torch.tensor([True, False]),
    "transposed": torch.randn(300, 200).t(),
    "strided": torch.arange(20)[::3],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "gradient": torch.ones(3, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(chain: Make, name: str) -> None:
    a, b = chain()
    labels = torch.tensor([1, 2])
    down = [
        *(kind(7, TENSORS[name], labels) for kind in (Activation, Input)),
        *(kind(7, labels, labels, along=TENSORS[name]) for kind in (Activation, Evaluation)),
    ]
    for sent in down:
        a.send(NEXT, sent)
    b.send(PREVIOUS, Answer(8, TENSORS[name]))
    for sent in down:
        assert alike(sent, take(b, PREVIOUS))
    assert alike(Answer(8, TENSORS[name]), take(a, NEXT))


def test_received_tensors_outlive_the_transport(chain: Make) -> None:
    a, b = chain()
    a.send(NEXT, Activation(1, torch.arange(1e5), torch.arange(3)))
    message = take(b, PREVIOUS)
    for transport in (a, b):
        transport.close()
    assert isinstance(message, Activation)
    assert torch.equal(message.x, torch.arange(1e5)) and torch.equal(message.y, torch.arange(3))


def test_the_side_named_first_comes_first(chain: Make) -> None:
    a, b, c = chain(3)
    for sides in ([NEXT, PREVIOUS], [PREVIOUS, NEXT]):
        a.send(NEXT, Checkpoint(1))
        c.send(PREVIOUS, Checkpoint(2))
        if isinstance(b, ZmqTransport):  # until both are there, whichever the kernel brings first
            assert all(edge.socket.poll(1000 * WAIT) for edge in b._edges.values())
        order = [b.receive(sides, WAIT) for _ in sides]
        assert [got and got[0] for got in order] == sides


# -- limits and waking -------------------------------------------------------------------------------------------


def test_receive_gives_up(chain: Make) -> None:
    a, b = chain()
    assert b.receive([PREVIOUS], 0) is None
    assert a.receive([NEXT], 0.05) is None
    assert a.receive([], 0.05) is None


def test_wake_before_and_during_receive(chain: Make) -> None:
    a, b = chain()
    b.wake()
    assert b.receive([PREVIOUS], WAIT) is None
    timer = threading.Timer(0.1, b.wake)
    timer.start()
    assert b.receive([PREVIOUS], WAIT) is None
    timer.join()
    a.send(NEXT, Checkpoint(1))
    assert batches(b, PREVIOUS, 1) == [1]  # and a wake is spent by the receive that it woke


def test_a_full_queue_makes_send_wait_and_then_give_up(chain: Make) -> None:
    a, b = chain(capacity=2, timeout=0.3)
    x = torch.zeros(2**18)  # 1 MB, so that sockets do not hold many
    sent = 0
    with pytest.raises(WaitTimeout, match=r"0.3 s"):
        while sent < 100:
            a.send(NEXT, Gradient(sent, x))
            sent += 1
    assert 2 <= sent < 20
    assert [take(b, PREVIOUS).batch for _ in range(sent)] == list(range(sent))  # type: ignore[union-attr]
    a.send(NEXT, Checkpoint(sent))
    assert batches(b, PREVIOUS, 1) == [sent]


def test_a_full_queue_goes_on_once_drained(chain: Make) -> None:
    a, b = chain(capacity=2)
    x = torch.zeros(2**18)

    def send_all() -> None:
        for k in range(40):
            a.send(NEXT, Gradient(k, x))

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_all)
        assert [take(b, PREVIOUS).batch for _ in range(40)] == list(range(40))  # type: ignore[union-attr]
        sending.result()


# -- endings -----------------------------------------------------------------------------------------------------


def test_what_was_sent_before_close_arrives(chain: Make) -> None:
    a, b = chain(capacity=64)
    for k in range(20):
        a.send(NEXT, Checkpoint(k))
    a.send(NEXT, Activation(20, torch.zeros(2**20), torch.zeros(1)))
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(a.close)  # what is large may not leave before it is asked for
        assert batches(b, PREVIOUS, 20) == list(range(20))
        assert isinstance(take(b, PREVIOUS), Activation)
        closing.result()
    assert_lost(b, PREVIOUS)


def test_close_while_the_other_sends(chain: Make) -> None:
    a, b = chain(capacity=2)

    def flood() -> None:
        for k in range(10**6):
            a.send(NEXT, Gradient(k, torch.zeros(2**16)))

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(flood)
        take(b, PREVIOUS)
        b.close()
        with pytest.raises(PeerLost):
            sending.result(WAIT)


def test_last_words_are_heard_after_a_send_found_nobody(chain: Make) -> None:
    a, b = chain(capacity=4)
    b.send(PREVIOUS, Stop(3, "why it ends"))
    b.close()
    with pytest.raises(PeerLost):
        for k in range(10**6):
            a.send(NEXT, Checkpoint(k))
    message = take(a, NEXT)
    assert isinstance(message, Stop) and message.reason == "why it ends"
    assert_lost(a, NEXT)


def test_a_lost_side_that_is_not_named_is_no_error(chain: Make) -> None:
    a, b, c = chain(3)
    c.send(PREVIOUS, Checkpoint(0))
    assert batches(b, NEXT, 1) == [0]
    c.close()
    a.send(NEXT, Checkpoint(1))
    assert batches(b, PREVIOUS, 1) == [1]
    assert b.receive([PREVIOUS], 0.2) is None
    assert_lost(b, NEXT)
    a.send(NEXT, Checkpoint(2))
    assert batches(b, PREVIOUS, 1) == [2]


def test_close_twice_and_wake_afterwards(chain: Make) -> None:
    for transport in chain(3):
        transport.close()
        transport.close()
        transport.wake()
