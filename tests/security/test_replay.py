"""Bytes of a valid connection, recorded and played again: nothing of them is delivered, and they are counted."""

from __future__ import annotations

import contextlib

import pytest

from benchmarks.relay import Recorder, play
from dnipipe.errors import PeerLost
from dnipipe.keys import KeyRing
from dnipipe.messages import Checkpoint
from dnipipe.service.links import Gone, Links
from tests.security.conftest import Party, say
from tests.service.test_links import Pair
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, assert_lost, batches

FORTH = pytest.mark.parametrize("forth", [True, False], ids=["to who listens", "to who connected"])
LOCKED = pytest.mark.parametrize("locked", [True, False], ids=["with keys", "without"])


@LOCKED
def test_a_connection_played_again_beside_the_true_one(party: Party, recorder: Recorder, locked: bool) -> None:
    a, b = party.pair(locked, recorder.start)
    for k in range(3):
        b.send(PREVIOUS, Checkpoint(k))
    assert batches(a, NEXT, 3) == [0, 1, 2]
    play(a._edges[NEXT].endpoint, recorder.begun[True], 0.2)
    if locked:  # it does not get through the handshake, and who is there goes on
        b.send(PREVIOUS, Checkpoint(3))
        assert batches(a, NEXT, 1) == [3]
        while not a.dropped:  # what came over the true connection may be read before the failure is
            assert a.receive([NEXT], 0.1) is None
        assert a.dropped == {"handshake failed": 1}
    else:
        with pytest.raises(PeerLost, match="was started again, it counts from 0"):
            a.receive([NEXT], WAIT)
        assert a.dropped == {"came before": 1}


@LOCKED
def test_a_connection_played_again_to_another_run(party: Party, recorder: Recorder, locked: bool) -> None:
    """Or to the same one when it was started again: each start has a token of its own."""
    a, b = party.pair(locked, recorder.start)
    b.send(PREVIOUS, Checkpoint(0))
    assert batches(a, NEXT, 1) == [0]
    fresh = party.one(KeyRing(party.at(0), 0) if locked else None)
    fresh.run = "another"
    play(fresh.listen("tcp://127.0.0.1:*"), recorder.begun[True], 0.2)
    with contextlib.suppress(PeerLost):  # that connection has ended
        while not fresh.dropped:
            assert fresh.receive([NEXT], 0.2) is None
    assert fresh.dropped == {"handshake failed" if locked else "another run": 1}


@LOCKED
@FORTH
def test_messages_said_again_on_their_own_connection(
    party: Party, recorder: Recorder, locked: bool, forth: bool
) -> None:
    """With keys the connection ends at once, and a new one goes on if who connected sees its end by itself."""
    a, b = party.pair(locked, recorder.start)
    (speaker, to), (listener, side) = ((b, PREVIOUS), (a, NEXT)) if forth else ((a, NEXT), (b, PREVIOUS))
    for k in range(3):
        speaker.send(to, Checkpoint(k))
    assert batches(listener, side, 3) == [0, 1, 2]
    recorder.say_again(3, forth)
    speaker.send(to, Checkpoint(3))
    assert batches(listener, side, 1) == [3]
    if locked and forth:
        while listener._edges[side].handshakes < 2:
            assert listener.receive([side], 0.1) is None
        speaker.send(to, Checkpoint(4))
        assert batches(listener, side, 1) == [4]
    else:
        says = "the connection broke" if locked else "it counts from 1, or somebody repeats what it said"
        assert_lost(listener, side, says)
        assert listener.dropped == ({} if locked else {"came before": 1})


# -- stages on their own -------------------------------------------------------------------------------------------


@LOCKED
@FORTH
def test_stages_on_their_own_drop_what_is_said_again_and_connect_anew(
    between: Pair, recorder: Recorder, forth: bool
) -> None:
    upper, lower = between.stage(0), between.stage(1)
    between.until_up(upper, lower)
    speaker, listener = (lower, upper) if forth else (upper, lower)
    say(speaker, 1, 2, 3)
    between.until(lambda: between.ids(listener) == [1, 2, 3], [upper, lower])
    recorder.say_again(2, forth)
    say(speaker, 4)
    between.until(lambda: bool(gone(between, listener)), [upper, lower])
    between.until_up(upper, lower)
    say(speaker, 5)
    between.until(lambda: 5 in between.ids(listener), [upper, lower])
    if between.keys:  # the fourth may be lost with the connection
        assert [k for k in between.ids(listener) if k != 4] == [1, 2, 3, 5]
        assert "the connection broke" in gone(between, listener)[0]
    else:
        assert between.ids(listener) == [1, 2, 3, 4, 5] and listener.dropped["came before"] == 1


@LOCKED
def test_a_whole_connection_of_a_stage_on_its_own(between: Pair, recorder: Recorder, locked: bool) -> None:
    """Played to it when its neighbour has gone: a greeting of old answers to none that was said now."""
    upper, lower = between.stage(0), between.stage(1)
    between.until_up(upper, lower)
    say(lower, 1, 2, 3)
    between.until(lambda: between.ids(upper) == [1, 2, 3], [upper, lower])
    lower.close()
    between.until(lambda: bool(gone(between, upper)), [upper])
    play(between.endpoint, recorder.begun[True], 0.2)
    between.until(lambda: upper.dropped.total() > 0, [upper])
    assert upper.receive([NEXT], 0.2) is None and not upper.up(NEXT)
    assert upper.dropped == ({"handshake failed": 1} if locked else {"an older connection's message": 3})


def gone(between: Pair, links: Links) -> list[str]:
    return [event.why for event in between.said[links] if isinstance(event, Gone)]
