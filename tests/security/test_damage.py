"""A cable that flips bits, with keys and without: what is delivered is what was sent, or the edge is lost."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from benchmarks.relay import Flipper, Recorder
from dnipipe.errors import PeerLost, WaitTimeout
from dnipipe.messages import Activation
from dnipipe.service.links import Gone
from tests.security.conftest import Party, say
from tests.service.test_links import Pair
from tests.transport.conftest import NEXT, PREVIOUS

SENT = [Activation(k, torch.full((64,), float(k)), torch.tensor([k])) for k in range(8)]
BYTES = {True: 4700, False: 3400}  # that they take on the wire, with what libzmq says before; locked or not


def deliver(party: Party, locked: bool, chance: random.Random) -> str:
    """Send SENT from stage 1 to stage 0 with one bit flipped on the way; what came of it. What arrives is as it was."""
    with Flipper() as cable, contextlib.ExitStack() as stack:
        cable.flip(chance.randrange(BYTES[locked]), chance.randrange(8))
        a, b = party.pair(locked, cable.start)
        for transport in (a, b):
            stack.callback(transport.close)
        party.made.clear()
        b.timeout = 0.5
        with contextlib.suppress(PeerLost, WaitTimeout):
            for message in SENT:
                b.send(PREVIOUS, message)
        arrived, lost = 0, False
        try:
            while arrived < len(SENT) and (got := a.receive([NEXT], 0.3)):
                sent, message = SENT[arrived], got[1]
                assert isinstance(message, Activation) and message.batch == sent.batch
                assert torch.equal(message.x, sent.x) and torch.equal(message.y, sent.y)
                arrived += 1
        except PeerLost:
            lost = True
        if not cable.flipped():
            return "not flipped"
        return "lost" if lost else "all there" if arrived == len(SENT) else "nothing more came"


def flip(party: Party, locked: bool, times: int) -> Counter[str]:
    chance = random.Random(5)
    return Counter(deliver(party, locked, chance) for _ in range(times))


@pytest.mark.parametrize("locked", [True, False], ids=["with keys", "without"])
def test_no_flipped_bit_is_delivered(party: Party, locked: bool) -> None:
    came_of_it = flip(party, locked, 25)
    assert came_of_it["not flipped"] <= 3 and came_of_it["lost"] + came_of_it["nothing more came"] >= 15, came_of_it


@pytest.mark.parametrize("locked", [True, False], ids=["with keys", "without"])
@pytest.mark.parametrize("forth", [True, False], ids=["to who listens", "to who connected"])
def test_stages_on_their_own_connect_anew_behind_a_flipped_bit(between: Pair, recorder: Recorder, forth: bool) -> None:
    """In a frame's flags, in its length, in what it holds: libzmq does not try again by itself behind each of them."""
    upper, lower = between.stage(0), between.stage(1)
    speaker, listener = (lower, upper) if forth else (upper, lower)
    for where, bit in ((0, 1), (1, 1), (30, 5)):
        between.until_up(upper, lower)
        before = sum(isinstance(event, Gone) for event in between.said[listener])
        recorder.flip(where, bit, forth)
        numbers = itertools.count(1)

        def noticed(before: int = before, numbers: Iterator[int] = numbers) -> bool:
            say(speaker, next(numbers))
            return recorder.flipped(forth) and sum(isinstance(one, Gone) for one in between.said[listener]) > before

        between.until(noticed, [upper, lower])
    between.until_up(upper, lower)
    assert bool(lower.dropped["damaged"] + upper.dropped["damaged"]) == (between.keys is None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("locked", [True, False], ids=["with keys", "without"])
def test_no_bit_of_a_thousand_is(party: Party, locked: bool) -> None:
    came_of_it = flip(party, locked, 1000)
    print(dict(came_of_it))
    assert came_of_it["not flipped"] <= 100, came_of_it
