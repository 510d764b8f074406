"""gloo beneath ZeroMQ: what is announced and never comes, what is too large, who may reach it, and what a sender keeps.

a ── header by ZeroMQ, tensors by gloo ──► b
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from dnipipe.errors import ConfigError, PeerLost, WaitTimeout
from dnipipe.messages import Activation, Checkpoint, Gradient, Received
from dnipipe.transport.apart import choose_interface
from dnipipe.transport.gloo import INTERFACE, GlooTransport
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, Gloo, assert_lost, batches, take

X, Y = torch.arange(12.0).reshape(3, 4), torch.tensor([1, 0, 2])


def pair(gloo: Gloo, **options: float) -> tuple[GlooTransport, GlooTransport]:
    a, b = gloo.chain(**options)  # type: ignore[arg-type]
    assert isinstance(a, GlooTransport) and isinstance(b, GlooTransport)
    return a, b


def announce(a: GlooTransport, message: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header goes, its tensors do not."""
    bulk = a._bulk[a._edges[NEXT]]
    monkeypatch.setattr(bulk, "post", lambda seq, tensors: None)
    a.send(NEXT, message)
    monkeypatch.undo()


def test_a_sender_keeps_its_tensors_until_they_have_arrived(gloo: Gloo) -> None:
    a, b = pair(gloo)
    bulk = a._bulk[a._edges[NEXT]]
    for batch in range(3):
        a.send(NEXT, Activation(batch, X, Y))
    a.send(NEXT, Checkpoint(2))
    assert list(bulk.under_way) == [0, 1, 2]
    for _ in range(3):
        take(b, PREVIOUS)
    b.send(PREVIOUS, Checkpoint(7))
    assert batches(a, NEXT, 1) == [7] and not bulk.under_way


def test_what_came_while_a_send_waited_is_not_lost_and_stays_in_order(gloo: Gloo) -> None:
    """Both ends have more on the way than their queues take; then each takes all."""
    a, b = pair(gloo, capacity=2)
    for batch in range(2):
        a.send(NEXT, Activation(batch, X, Y))
        b.send(PREVIOUS, Gradient(batch, X))
    b.send(PREVIOUS, Checkpoint(2))
    sending = threading.Thread(target=lambda: a.send(NEXT, Activation(2, X, Y)))
    sending.start()
    assert [take(b, PREVIOUS).batch for _ in range(3)] == [0, 1, 2]  # type: ignore[union-attr]
    sending.join()
    assert len(a._edges[NEXT].kept) == 3
    b.send(PREVIOUS, Checkpoint(3))
    got = [take(a, NEXT) for _ in range(4)]
    assert [(type(message).__name__, message.batch) for message in got] == [  # type: ignore[union-attr]
        ("Gradient", 0),
        ("Gradient", 1),
        ("Checkpoint", 2),
        ("Checkpoint", 3),
    ]


def test_tensors_that_never_come_are_a_wait_timeout(gloo: Gloo, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(gloo, timeout=0.5)
    announce(a, Activation(4, X, Y), monkeypatch)
    with pytest.raises(WaitTimeout, match=r"transport\.timeout\) for 72 bytes that the previous stage announced"):
        b.receive([PREVIOUS], WAIT)
    a.send(NEXT, Checkpoint(5))
    assert b.receive([PREVIOUS], 0.2) is None  # nothing behind the gap is handed out


def test_a_sender_that_dies_before_its_tensors_came_is_lost(gloo: Gloo, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(gloo)
    announce(a, Activation(4, X, Y), monkeypatch)
    dying = threading.Timer(0.2, a._bulk.clear)
    dying.start()
    with pytest.raises(PeerLost, match=r"previous stage is gone: .*Connection closed by peer"):
        b.receive([PREVIOUS], WAIT)
    dying.join()
    assert_lost(b, PREVIOUS)


def test_a_send_to_one_that_is_gone_is_lost(gloo: Gloo) -> None:
    a, b = pair(gloo)
    b._bulk.clear()
    with pytest.raises(PeerLost, match="stage n is gone"):
        for batch in range(10**6):
            a.send(NEXT, Activation(batch, X, Y))


def test_close_does_not_wait_longer_than_it_lingers(gloo: Gloo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnipipe.transport.apart.LINGER", 0.2)
    a, _ = pair(gloo)
    a.send(NEXT, Activation(1, X, Y))
    closing = threading.Thread(target=a.close)
    closing.start()
    closing.join(WAIT)
    assert not closing.is_alive()


def test_more_than_the_limit_is_refused_before_memory_is_reserved(gloo: Gloo) -> None:
    a, b = pair(gloo)
    b.max_message = 47
    a.send(NEXT, Activation(1, X, Y))
    assert b.receive([PREVIOUS], 0.5) is None and b.dropped == {"malformed": 1}
    b.close()  # or a would linger


def test_a_strange_received_frees_nothing(gloo: Gloo) -> None:
    a, b = pair(gloo)
    a.send(NEXT, Activation(1, X, Y))
    b._put(b._edges[PREVIOUS], Received(99))
    assert a.receive([NEXT], 0.2) is None and list(a._bulk[a._edges[NEXT]].under_way) == [0]
    take(b, PREVIOUS)


def test_nobody_to_join_is_a_wait_timeout(gloo: Gloo) -> None:
    alone = gloo.one(timeout=0.3)
    alone.listen(gloo.address())
    assert isinstance(alone, GlooTransport)
    with pytest.raises(WaitTimeout, match=r"0\.3 s \(transport\.timeout\) for stage n to join by gloo"):
        alone.join(NEXT, HashStore())


# -- who may reach it ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_listens_on_loopback_only(gloo: Gloo) -> None:
    def listening() -> set[str]:
        mine = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()}
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
        ]
        return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in mine}

    before = listening()
    pair(gloo)
    opened = listening() - before
    assert opened and all(address.startswith("0100007F:") for address in opened)


def test_on_several_machines_the_interface_is_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INTERFACE, raising=False)
    with pytest.raises(ConfigError, match=r"gloo on 2 machines: set the environment variable GLOO_SOCKET_IFNAME"):
        choose_interface(INTERFACE, "gloo", machines=2)
    monkeypatch.setenv(INTERFACE, "eth7")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME=eth7 can be reached by other machines.*private_network"):
        choose_interface(INTERFACE, "gloo", machines=2)
    choose_interface(INTERFACE, "gloo", machines=2, private=True)
    choose_interface(INTERFACE, "gloo", machines=1, private=True)
    assert os.environ[INTERFACE] == "eth7"
