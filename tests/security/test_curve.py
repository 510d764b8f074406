"""Only the neighbour is let in: what any other key sends never arrives, and nothing is sent to it."""

from __future__ import annotations

import shutil
import time

import pytest
import torch

from benchmarks.faults import strangers
from dnipipe import codec, keys
from dnipipe.errors import ConfigError, PeerLost, WaitTimeout
from dnipipe.keys import KeyRing
from dnipipe.messages import Checkpoint, Gradient
from dnipipe.transport.zmq import ZmqTransport
from tests.security.conftest import Party
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, assert_lost, batches, take


@pytest.mark.parametrize("key", strangers.KINDS)
def test_no_other_key_is_let_in(party: Party, key: str) -> None:
    other = strangers.KINDS[key](party.at(0), 1, party.folder / "stranger")
    a, b = party.one(KeyRing(party.at(0), 0), timeout=0.3), party.one(other)
    b.connect(a.listen("tcp://127.0.0.1:*"))
    with pytest.raises((PeerLost, WaitTimeout)):
        b.send(PREVIOUS, Checkpoint(1))
        b.receive([PREVIOUS], 2.0)
        raise WaitTimeout("it went out of b, but who has no keys does not know better")
    with pytest.raises(WaitTimeout):
        a.send(NEXT, Checkpoint(2))
    assert a.receive([NEXT], 0.3) is None
    assert sum(a.dropped.values()) >= 1
    assert_the_neighbour_still_can(party, a)


def assert_the_neighbour_still_can(party: Party, a: ZmqTransport) -> None:
    b = party.one(KeyRing(party.at(1), 1), timeout=WAIT)
    b.connect(a._edges[NEXT].endpoint)
    b.send(PREVIOUS, Checkpoint(3))
    assert batches(a, NEXT, 1) == [3]


def test_a_bare_socket_gets_nothing_in_and_nothing_out(party: Party) -> None:
    a = party.one(KeyRing(party.at(0), 0), timeout=0.3)
    endpoint = a.listen("tcp://127.0.0.1:*")
    with strangers.bare(endpoint) as bare:
        bare.send_multipart(codec.encode(Checkpoint(1), "run", 0))
        with pytest.raises(WaitTimeout):
            a.send(NEXT, Checkpoint(2))
        assert a.receive([NEXT], 0.3) is None and not bare.poll(0)


@pytest.mark.parametrize("locked", [True, False], ids=["with a key of its own", "without keys"])
def test_who_listens_in_the_neighbours_place_hears_nothing(party: Party, locked: bool) -> None:
    """Stage 1 connects only to who has stage 0's key."""
    folder = party.folder / "impostor"
    shutil.copytree(party.at(0), folder)
    for part in ("public", "secret"):
        (folder / part / "stage-0-1.key").unlink()
    assert list(keys.new(folder, [0]))
    a = party.one(KeyRing(folder, 0) if locked else None)
    b = party.one(KeyRing(party.at(1), 1), timeout=0.5)
    b.connect(a.listen("tcp://127.0.0.1:*"))
    with pytest.raises((PeerLost, WaitTimeout)):
        b.send(PREVIOUS, Checkpoint(1))
    assert a.receive([NEXT], 0.3) is None


@pytest.mark.parametrize("locked", [True, False], ids=["with keys", "without"])
def test_the_largest_tensor_that_may_be_sent_arrives(party: Party, locked: bool) -> None:
    """Encrypted, it is 33 bytes more on the wire."""
    a, b = party.pair(locked)
    b.send(PREVIOUS, Gradient(1, torch.zeros(b.max_message // 4)))
    assert isinstance(take(a, NEXT), Gradient)


def test_who_is_refused_is_told_what_to_do(party: Party) -> None:
    his_own = strangers.of_his_own(party.at(0), 1, party.folder / "stranger")
    a, b = party.one(KeyRing(party.at(0), 0)), party.one(his_own)
    b.connect(a.listen("tcp://127.0.0.1:*"))
    assert_lost(b, PREVIOUS, "does not accept this stage's key: copy its public file there")


def test_keys_on_one_side_only_are_told_apart_from_a_silent_neighbour(party: Party) -> None:
    a, b = party.one(None), party.one(KeyRing(party.at(1), 1))
    b.connect(a.listen("tcp://127.0.0.1:*"))
    assert_lost(b, PREVIOUS, "has keys and this stage has none, or the other way round")


def test_a_neighbour_of_whom_no_key_is_known_is_said_at_the_start(party: Party) -> None:
    (party.at(1) / "public" / "stage-0-1.key").unlink()
    b = party.one(KeyRing(party.at(1), 1))
    with pytest.raises(ConfigError, match=r"no key of stage 0 in .*public: copy it there"):
        b.connect("tcp://127.0.0.1:1")


# -- while it runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binder", [True, False], ids=["of the stage that connects", "of the stage that listens"])
def test_a_revoked_key_is_cut_off(party: Party, binder: bool) -> None:
    a, b = party.pair()
    for k in range(3):
        a.send(NEXT, Checkpoint(k))
        b.send(PREVIOUS, Checkpoint(k))
    assert batches(b, PREVIOUS, 3) == batches(a, NEXT, 3) == [0, 1, 2]
    (here, side), (there, other) = ((a, NEXT), (b, PREVIOUS)) if binder else ((b, PREVIOUS), (a, NEXT))
    assert list(keys.revoke(party.at(0 if binder else 1), ["stage-1-1" if binder else "stage-0-1"]))
    assert_lost(here, side, "was revoked")
    with pytest.raises((PeerLost, WaitTimeout)):
        for k in range(10**6):
            there.send(other, Checkpoint(k))
            time.sleep(0.01)


def test_what_a_revoked_key_still_sends_is_not_delivered(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = party.pair()
    b.send(PREVIOUS, Checkpoint(0))
    assert batches(a, NEXT, 1) == [0]
    monkeypatch.setattr(keys, "AGAIN", 0.0)
    a.ring._next = 0.0  # type: ignore[union-attr]
    b.send(PREVIOUS, Checkpoint(1))
    assert a._edges[NEXT].socket.poll(1000 * WAIT)  # it is here, and the key it came with is revoked now
    assert list(keys.revoke(party.at(0), ["stage-1-1"]))
    with pytest.raises(PeerLost, match="was revoked"):
        a.receive([NEXT], WAIT)
    assert a.dropped == {"key revoked": 1}


def test_a_new_key_is_let_in_beside_the_old_one(party: Party) -> None:
    a = party.one(KeyRing(party.at(0), 0))
    endpoint = a.listen("tcp://127.0.0.1:*")
    assert list(keys.new(party.at(1), [1]))
    party.give("stage-1-2", 1, 0)
    b = party.one(KeyRing(party.at(1), 1), timeout=WAIT)
    assert b.ring and b.ring.public == (party.at(1) / "public" / "stage-1-2.key").read_bytes().strip()
    b.connect(endpoint)
    b.send(PREVIOUS, Checkpoint(1))
    assert batches(a, NEXT, 1) == [1]
    assert list(keys.revoke(party.at(0), ["stage-1-1"]))  # of nobody who is here
    time.sleep(1.2 * keys.AGAIN)
    b.send(PREVIOUS, Gradient(2, None))
    assert isinstance(take(a, NEXT), Gradient)


def test_the_stage_that_listens_may_use_either_of_its_keys(party: Party) -> None:
    """Who connects must know which: it tries the newest first."""
    a = party.one(KeyRing(party.at(0), 0))
    assert list(keys.new(party.at(0), [0]))
    party.give("stage-0-2", 0, 1)
    b = party.one(KeyRing(party.at(1), 1), timeout=WAIT)
    b.connect(a.listen("tcp://127.0.0.1:*"))
    b.send(PREVIOUS, Checkpoint(1))
    assert batches(a, NEXT, 1) == [1]
