"""What a kernel tells of a message that is on its way."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from dnipipe.transport import arriving as module
from dnipipe.transport.arriving import HEARTBEATS, LEAST, TELLS, Arriving, received

Ends = tuple[socket.socket, socket.socket]

linux = pytest.mark.skipif(not TELLS, reason="only Linux tells how many bytes came")


@pytest.fixture
def ends() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        with one, server.accept()[0] as other:
            yield one, other


def came(there: socket.socket, count: int) -> None:
    """Until so many bytes have come in all."""
    end = time.monotonic() + 10
    while received(there.fileno()) != count:
        assert time.monotonic() < end, received(there.fileno())
        time.sleep(0.01)


@linux
def test_part_of_a_message_is_more_and_what_heartbeats_bring_is_not(ends: Ends) -> None:
    here, there = ends
    arriving, looked = Arriving(), time.monotonic()
    assert not arriving.more(there.fileno(), looked)  # the first look
    here.sendall(bytes(LEAST))
    came(there, LEAST)
    assert not arriving.more(there.fileno(), looked)
    here.sendall(bytes(LEAST + 60 * HEARTBEATS))  # in less than a minute
    came(there, 2 * LEAST + 60 * HEARTBEATS)
    assert arriving.more(there.fileno(), looked)
    assert not arriving.more(there.fileno(), looked)  # nothing since


@linux
def test_what_came_before_the_last_word_is_no_more(ends: Ends) -> None:
    here, there = ends
    arriving = Arriving()
    arriving.more(there.fileno(), 0.0)
    here.sendall(bytes(100 * LEAST))
    came(there, 100 * LEAST)
    assert not arriving.more(there.fileno(), since=time.monotonic())


@linux
def test_stillness_is_as_long_as_looks_in_a_row_find_nothing(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = ends
    arriving, now = Arriving(), 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)

    def after(seconds: float) -> float:
        nonlocal now
        now += seconds
        return arriving.still(there.fileno())

    assert [after(1), after(1), after(1.5)] == [0, 1, 2.5]
    assert [after(60), after(1)] == [0, 1]  # who did not look cannot tell
    here.sendall(b"x")
    while received(there.fileno()) != 1:
        pass
    assert [after(1), after(1)] == [0, 1]


def test_where_nobody_knows_nothing_comes(ends: Ends) -> None:
    one, other = socket.socketpair()  # as of a socket file
    with one, other:
        assert received(one.fileno()) is None
        assert not Arriving().more(one.fileno(), 0.0) and not Arriving().still(one.fileno())
    gone = ends[0].fileno()
    ends[0].close()
    assert received(gone) is None
