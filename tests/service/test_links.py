"""Edges that outlast a neighbour, both ends in this process."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq

from dnipipe import codec
from dnipipe.errors import HandshakeError, MessageError, Replaced
from dnipipe.keys import KeyRing
from dnipipe.messages import Activation, Gradient, Message
from dnipipe.service.links import AGAIN, Gone, Links, Up
from dnipipe.transport import Side
from dnipipe.transport.zmq import BAD_LIMIT

NEXT, PREVIOUS = Side.NEXT, Side.PREVIOUS
LIMIT = 20.0  # seconds, for a machine that is busy


class Pair:
    """Stages 0 and 1, and whoever else is made; `said` is what happened to each, `got` what it received.

    `way` is where stage 1 connects, if somebody sits between; `keys` a folder of theirs, if they have any.
    """

    def __init__(self, endpoint: str, way: str = "", keys: Path | None = None) -> None:
        self.endpoint, self.way, self.keys = endpoint, way or endpoint, keys
        self.made: list[Links] = []
        self.said: dict[Links, list[Gone | Up]] = {}
        self.got: dict[Links, list[Message]] = {}
        self.settings = ("rule.name=local",)

    def stage(self, k: int, incarnation: int = 1, run: str = "r", spare: int = 0) -> Links:
        ring = KeyRing(self.keys, k) if self.keys else None
        options = {"queue": 64, "timeout": LIMIT, "max_message": 2**20, "spare": spare, "ring": ring}
        links = Links(k, 2, incarnation, self.settings, **options)
        links.run_id = run
        self.made.append(links)
        self.said[links], self.got[links] = [], []
        if k == 0:
            links.listen(self.endpoint)
        else:
            links.connect(self.way)
        return links

    def until(self, happens: Callable[[], bool], among: Sequence[Links]) -> None:
        """Each in turn takes what comes, until that is so."""
        end = time.monotonic() + LIMIT
        while not happens():
            assert time.monotonic() < end, (self.said, self.got, [links.dropped for links in among])
            for links in among:
                got = links.receive([side(links)], 0.01)
                self.said[links] += [event for _, event in links.events]
                links.events.clear()
                if got:
                    self.got[links].append(got[1])

    def until_up(self, *among: Links) -> None:
        self.until(lambda: all(links.up(side(links)) for links in among), among)

    def until_spoken(self, upper: Links, lower: Links) -> None:
        """Both are up, and the lower one has said something."""
        self.until_up(upper, lower)
        lower.send(PREVIOUS, Gradient(1, None))
        self.until(lambda: self.ids(upper) == [1], [upper, lower])

    def ids(self, links: Links) -> list[int]:
        return [message.batch for message in self.got[links] if isinstance(message, (Activation, Gradient))]


def side(links: Links) -> Side:
    return NEXT if links.stage == 0 else PREVIOUS


def activation(batch: int) -> Activation:
    return Activation(batch, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


@pytest.fixture(params=["ipc", "tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Pair(f"tcp://127.0.0.1:{port}" if request.param == "tcp" else f"ipc://{tmp_path}/edge")
    yield made
    for links in made.made:
        links.close()


@pytest.mark.parametrize("first", [0, 1])
def test_they_find_one_another_in_any_order(pair: Pair, first: int) -> None:
    one = pair.stage(first)
    assert one.receive([side(one)], 0.2) is None
    other = pair.stage(1 - first)
    pair.until_up(one, other)
    upper, lower = (one, other) if first == 0 else (other, one)
    upper.send(NEXT, activation(1))
    lower.send(PREVIOUS, Gradient(1, torch.ones(2, 3)))
    pair.until(lambda: pair.ids(upper) == [1] and pair.ids(lower) == [1], [upper, lower])
    assert [type(event) for event in pair.said[upper]] == [Up]


def test_one_that_goes_is_missed_and_comes_back_as_another(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    lower.last = 5
    pair.until_up(upper, lower)
    assert upper.last_of(NEXT) == 5
    upper.send(NEXT, activation(6))  # nobody takes it
    lower.close()
    pair.until(lambda: any(isinstance(event, Gone) for event in pair.said[upper]), [upper])
    upper.send(NEXT, activation(7))
    assert upper.dropped["Activation to stage 1, which is away"] == 1
    again = pair.stage(1, incarnation=2)
    again.last = 9
    pair.until_up(upper, again)
    assert upper.last_of(NEXT) == 9
    upper.send(NEXT, activation(10))
    pair.until(lambda: bool(pair.ids(again)), [upper, again])
    assert pair.ids(again) == [10]


def test_the_stage_before_comes_back_too(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_up(upper, lower)
    upper.close()
    pair.until(lambda: any(isinstance(event, Gone) for event in pair.said[lower]), [lower])
    if pair.endpoint.startswith("ipc"):
        return  # a socket file that is made again is another edge's business (place.own_endpoint)
    again = pair.stage(0, incarnation=2)
    pair.until_up(again, lower)
    lower.send(PREVIOUS, Gradient(3, None))
    pair.until(lambda: pair.ids(again) == [3], [again, lower])


def test_an_older_process_of_a_stage_is_fenced(pair: Pair) -> None:
    upper, older = pair.stage(0), pair.stage(1, incarnation=1)
    pair.until_up(upper, older)
    newer = pair.stage(1, incarnation=2)

    def fenced() -> bool:
        try:
            older.receive([PREVIOUS], 0.01)
        except Replaced as error:
            assert "incarnation 2 of stage 1 has taken its place" in str(error)
            return True
        return False

    pair.until(fenced, [upper, newer])
    older.close()
    pair.until_up(upper, newer)
    upper.send(NEXT, activation(1))
    pair.until(lambda: pair.ids(newer) == [1], [upper, newer])


@pytest.mark.parametrize("last", [0, 7])
def test_who_has_trained_nothing_yet_is_told_of_a_clock_that_was_set_back(pair: Pair, last: int) -> None:
    """Its folder may be new, and its number lower than an earlier one only because it counts from the time of day."""
    upper, newer = pair.stage(0), pair.stage(1, incarnation=1764000002)
    pair.until_up(upper, newer)
    newer.close()
    again = pair.stage(1, incarnation=1764000001)
    again.last = last
    with pytest.raises(Replaced, match="incarnation 1764000002 of stage 1 has taken its place") as caught:
        pair.until(lambda: False, [upper, again])
    assert ("the clock here was set back" in str(caught.value)) == (last == 0)


def test_a_gap_ends_the_connection_and_nothing_behind_it_is_taken(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_up(upper, lower)
    upper.send(NEXT, activation(1))
    upper._edges[NEXT].sent += 1  # as if the network had lost one
    upper.send(NEXT, activation(3))
    pair.until(lambda: any(isinstance(event, Gone) for event in pair.said[lower]), [upper, lower])
    assert "messages of stage 0 were lost on the way" in str(pair.said[lower])
    pair.until_up(upper, lower)
    upper.send(NEXT, activation(4))
    pair.until(lambda: 4 in pair.ids(lower), [upper, lower])
    assert pair.ids(lower) == [1, 4] and lower.dropped["behind a gap"] == 1


def test_what_is_lost_at_the_end_is_missed_though_nothing_follows(pair: Pair) -> None:
    """A window that is full of it would never be empty again."""
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_up(upper, lower)
    upper.send(NEXT, activation(1))
    upper._edges[NEXT].sent += 2  # as if the network had lost two
    pair.until(lambda: len(pair.said[upper]) > 2 and len(pair.said[lower]) > 2, [upper, lower])
    assert "2 messages of stage 0 were lost on the way" in str(pair.said[lower])
    assert [type(event) for event in pair.said[upper]][:3] == [Up, Gone, Up] and pair.ids(lower) == [1]


def test_one_that_is_given_up_is_asked_again(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_up(upper, lower)
    upper.give_up(NEXT, "it hangs")
    assert not upper.up(NEXT)
    lower.send(PREVIOUS, Gradient(1, None))  # of the connection that was given up
    pair.until_up(upper, lower)
    lower.send(PREVIOUS, Gradient(2, None))
    pair.until(lambda: 2 in pair.ids(upper), [upper, lower])
    assert pair.ids(upper) == [2] and "it hangs" in str(pair.said[upper])


@pytest.mark.parametrize(
    ("run", "named"), [("other", "run is '[a-z]+' there, '[a-z]+' expected here"), ("r", "rule.name")]
)
def test_a_stranger_is_refused_by_name(pair: Pair, run: str, named: str) -> None:
    upper = pair.stage(0)
    if run == "r":
        pair.settings = ("rule.name=blend",)
    lower = pair.stage(1, run=run)
    with pytest.raises(HandshakeError, match=named):
        pair.until(lambda: False, [upper, lower])


def test_a_stage_that_knows_its_neighbour_outlives_a_stranger_who_ends(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_up(upper, lower)
    lower.close()
    stranger = pair.stage(1, run="another")
    with pytest.raises(HandshakeError, match="stage 1 refuses who connects as stage 0: run is 'r' there"):
        pair.until_up(upper, stranger)
    stranger.close()
    again = pair.stage(1, incarnation=2)
    pair.until_up(upper, again)
    assert upper.dropped["a stage that does not belong here"] >= 1


def test_silence_is_measured_from_the_first_word_on(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_up(upper, lower)
    assert upper.quiet(NEXT) == 0  # it may still be building
    lower.send(PREVIOUS, Gradient(1, None))
    pair.until(lambda: pair.ids(upper) == [1], [upper, lower])
    time.sleep(0.1)
    assert upper.quiet(NEXT) >= 0.1
    lower.send(PREVIOUS, Gradient(2, None))
    pair.until(lambda: pair.ids(upper) == [1, 2], [upper, lower])
    assert upper.longest(NEXT) >= 0.1


def test_the_link_that_each_loop_sends_again_and_again_is_a_word(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, so that each hears of the other that its loop goes round."""
    monkeypatch.setattr("dnipipe.service.links.AGAIN", 0.05)
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_spoken(upper, lower)
    upper.send(NEXT, activation(1))
    pair.until(lambda: pair.ids(lower) == [1], [upper, lower])
    silences = {links: links._bonds[side(links)].silences for links in (upper, lower)}
    for each in silences.values():
        each.clear()
    pair.until(lambda: all(len(each) >= 3 for each in silences.values()), [upper, lower])
    assert pair.ids(upper) == pair.ids(lower) == [1]


def test_a_wait_ends_when_the_next_link_is_due(pair: Pair) -> None:
    """Or a stage that has nothing to do would be silent for as long as it waits."""
    upper, lower = pair.stage(0), pair.stage(1)
    asked: list[int] = []
    poller: Any = SimpleNamespace(poll=lambda milliseconds: asked.append(milliseconds) or [])
    lower._poll(poller, [], 5.0)
    pair.until_up(upper, lower)
    lower._introduce(PREVIOUS, anew=False)
    lower._poll(poller, [], 5.0)
    assert asked[0] == 5000 and asked[1] <= 1000 * AGAIN


def test_nor_is_the_time_in_which_nobody_listened_on_that_side(pair: Pair) -> None:
    """Where the window is full, nothing is taken from the stage before, and so none of its Links."""
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_spoken(upper, lower)
    before = time.monotonic()
    upper.receive([], 0.0)
    assert upper._bonds[NEXT].heard >= before


def test_what_this_process_did_not_listen_is_no_silence(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_spoken(upper, lower)
    quiet = upper.quiet(NEXT)
    time.sleep(0.3)
    upper.stood(0.3)
    assert upper.quiet(NEXT) < quiet + 0.3
    upper.stood(1e9)  # however long: it has not said anything that is still to come
    assert upper.quiet(NEXT) >= 0


def test_the_silence_of_one_that_was_given_up_and_only_slow_counts(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_spoken(upper, lower)
    time.sleep(0.1)
    upper.give_up(NEXT, "it hangs")
    time.sleep(0.2)
    pair.until_up(upper, lower)
    assert upper.longest(NEXT) >= 0.3


def test_how_long_one_was_dead_is_no_silence(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)
    pair.until_spoken(upper, lower)
    longest = upper.longest(NEXT)
    lower.close()
    pair.until(lambda: not upper.up(NEXT), [upper])
    time.sleep(0.3)
    pair.until_up(upper, pair.stage(1, incarnation=2))
    assert upper.longest(NEXT) == longest


@pytest.mark.parametrize(
    ("frames", "reason", "limit"),
    [
        ([b"garbage"], "malformed", BAD_LIMIT),
        (codec.encode(Gradient(1, None), "of no connection", 0), "an older connection's message", 2 * 64 + 1),
    ],
    ids=["garbage", "other messages"],
)
def test_who_keeps_sending_garbage_is_cut_off_and_the_neighbour_comes_through(
    pair: Pair, frames: list[codec.Frame], reason: str, limit: int
) -> None:
    upper = pair.stage(0)
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.connect(pair.endpoint)
        monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        monitor.linger = 0
        for _ in range(limit):
            peer.send_multipart(frames if pair.endpoint.startswith("ipc") else [*frames, codec.checksum(frames)])
        pair.until(lambda: bool(monitor.poll(0)), [upper])
        assert upper.dropped == {reason: limit}
        peer.disable_monitor()
        monitor.close()
    lower = pair.stage(1)
    pair.until_up(upper, lower)
    upper.send(NEXT, activation(1))
    pair.until(lambda: pair.ids(lower) == [1], [upper, lower])


def test_a_message_that_is_not_as_agreed_is_dropped_and_the_connection_begins_anew(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1)

    def agreed(side: Side, message: Message) -> None:
        if isinstance(message, Activation) and message.batch == 2:
            raise MessageError("not this one", reason="not as agreed")

    lower.fits = agreed
    pair.until_up(upper, lower)
    for batch in (1, 2, 3):
        upper.send(NEXT, activation(batch))
    pair.until(lambda: sum(isinstance(event, Up) for event in pair.said[lower]) == 2, [upper, lower])
    gone = [event.why for event in pair.said[lower] if isinstance(event, Gone)]
    assert pair.ids(lower) == [1] and gone == [
        "messages of stage 0 were lost on the way: 1 were dropped here, the last for not this one"
    ]
    pair.until_up(upper, lower)
    upper.send(NEXT, activation(4))
    pair.until(lambda: pair.ids(lower) == [1, 4], [upper, lower])
    assert lower.dropped["not as agreed"] == 1


@pytest.mark.parametrize("first", [0, 1])
def test_a_greeting_that_is_lost_is_said_again(pair: Pair, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who did not hear the other's answer would wait for ever, for the other is up already."""
    one, other = pair.stage(first), pair.stage(1 - first)
    real, lost = one._say, list[str]()

    def say(to: Side, seen: str, refused: str = "") -> None:
        if seen and not lost:
            lost.append(seen)
            one._bonds[to].introduced = time.monotonic()
        else:
            real(to, seen, refused)

    monkeypatch.setattr(one, "_say", say)
    pair.until_up(one, other)
    other.send(side(other), Gradient(1, None))
    pair.until(lambda: pair.ids(one) == [1], [one, other])
    assert lost and not any(isinstance(event, Gone) for event in pair.said[one])


def test_what_waits_for_a_neighbour_that_is_given_up_is_dropped_and_counted(pair: Pair) -> None:
    upper, lower = pair.stage(0), pair.stage(1, spare=2)
    pair.until_up(upper, lower)
    waiting, batches = lower._edges[PREVIOUS].backlog, itertools.count(1)
    assert waiting is not None
    while len(waiting) < 5:  # nobody reads: once 64 have come and every buffer is full, they wait
        lower.send(PREVIOUS, Gradient(next(batches), torch.zeros(2**17)))
    left = len(waiting)
    lower.give_up(PREVIOUS, "for a test")
    assert not waiting and lower.dropped["Message that waited for room to stage 0, which is away"] == left
