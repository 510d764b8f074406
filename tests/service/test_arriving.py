"""A neighbour whose message is on its way is not silent, however long the link takes for it.

stage 1 ──► Holder: a piece at a time ──► stage 0
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from benchmarks.relay import LOOPBACK, Passed, Relay, free_port
from dnipipe.messages import Gradient
from dnipipe.service.links import Links
from tests.service.test_links import LIMIT, NEXT, PREVIOUS, Pair

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how many bytes came")


class Holder(Relay):
    """Once it `holds`, one piece of what goes to its target passes for each release of `pieces`."""

    def __init__(self) -> None:
        super().__init__()
        self.holds, self.pieces = False, threading.Semaphore(0)

    def _way(self, forth: bool) -> Passed:
        return self._held if forth else bytes

    def _held(self, data: bytes) -> bytes:
        return data if not self.holds or self.pieces.acquire(timeout=LIMIT) else b""


@pytest.fixture
def holder() -> Iterator[Holder]:
    with Holder() as made:
        yield made
        made.pieces.release(1000)


@pytest.fixture
def pair(holder: Holder) -> Iterator[Pair]:
    endpoint = f"tcp://{LOOPBACK}:{free_port()}"
    made = Pair(endpoint, holder.start(endpoint))
    yield made
    for links in made.made:
        links.close()


def heard(links: Links) -> float:
    """When it last heard the next stage, now that it was asked whether that is quiet."""
    links.quiet(NEXT)
    return links._bonds[NEXT].heard


def test_more_of_a_message_is_a_word_and_half_of_one_that_comes_to_a_stop_is_none(pair: Pair, holder: Holder) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_spoken(upper, lower)
    holder.holds = True
    lower.send(PREVIOUS, Gradient(2, torch.zeros(200_000)))
    before = heard(upper)
    pair.until(lambda: bool(holder.pieces.release() or heard(upper) > before), [upper])
    pair.until(lambda: upper.quiet(NEXT) > 0.3, [upper])
    assert pair.ids(upper) == [1]
    holder.pieces.release(1000)
    pair.until(lambda: pair.ids(upper) == [1, 2], [upper])


def test_a_message_that_takes_for_ever_is_a_silence_in_the_end(pair: Pair, holder: Holder) -> None:
    """After transport.timeout: or else whoever writes byte by byte would be waited for."""
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_spoken(upper, lower)
    before, holder.holds = heard(upper), True
    lower.send(PREVIOUS, Gradient(2, torch.zeros(200_000)))  # a dozen pieces
    pair.until(lambda: bool(holder.pieces.release() or heard(upper) > before), [upper])
    upper.timeout = 0.0  # that is over: whatever more of it comes, however soon
    word = heard(upper)
    pair.until(lambda: bool(holder.pieces.release() or upper._edges[NEXT]._part > word), [upper])
    assert heard(upper) == word and pair.ids(upper) == [1]
