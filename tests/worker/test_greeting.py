"""The first words: a Hello each way on each edge, and a neighbour that does not fit is refused by the field's name.

stage 0 ──Hello──► stage 1 ──Hello──► stage 2
        ◄──Hello──         ◄──Hello──
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from dnipipe.errors import HandshakeError, PeerStopped, WaitTimeout
from dnipipe.messages import PROTOCOL, Activation, Hello, Stop
from dnipipe.transport import Side
from tests.worker.bench import Bench

Make = Callable[..., Bench]

SETTINGS = ("optimizer.lr=0.1", "rule.name=wait")
MINE = {  # what stage 1 says on its two edges
    Side.PREVIOUS: Hello("a run", 1, 3, 0, SETTINGS, (4, 8), "float32"),
    Side.NEXT: Hello("a run", 1, 3, 0, SETTINGS, (4, 6), "float32"),
}
THEIRS = {Side.PREVIOUS: replace(MINE[Side.PREVIOUS], stage=0), Side.NEXT: replace(MINE[Side.NEXT], stage=2)}
WRONG: dict[str, Any] = {
    "protocol": PROTOCOL + 1,
    "run": "another run",
    "stages": 4,
    "stage": 1,
    "incarnation": 1,
    "shape": (4, 9),
    "dtype": "float16",
    "settings": ("optimizer.lr=0.2", "rule.name=wait"),
}


def says(bench: Bench, side: Side, *messages: object) -> None:
    (bench.previous if side is Side.PREVIOUS else bench.next)(*messages)  # type: ignore[arg-type]


def test_neighbours_that_fit_greet_and_go_on(bench: Make) -> None:
    one = bench()
    for side in Side:
        says(one, side, THEIRS[side])
    one.worker.greet(MINE)
    assert [one.heard(side) for side in Side] == [[MINE[side]] for side in Side]


def test_one_may_greet_late_and_what_the_other_says_behind_its_hello_stays_for_the_loop(bench: Make) -> None:
    one = bench()
    says(one, Side.PREVIOUS, THEIRS[Side.PREVIOUS], Stop(0))
    one.wire.late.append(lambda: says(one, Side.NEXT, THEIRS[Side.NEXT]))
    one.worker.greet(MINE)
    assert one.wire.log[-2:] == ["from previous: Hello", "from next: Hello"]
    one.next_answers().worker.run()
    assert "from previous: Stop 0" in one.wire.log


def test_every_field_of_a_hello_has_a_wrong_value_here() -> None:
    assert {item.name for item in fields(Hello)} == set(WRONG)


@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
@pytest.mark.parametrize("field", WRONG)
def test_a_field_that_differs_is_refused_by_its_name(bench: Make, side: Side, field: str) -> None:
    one = bench()
    for each in Side:
        says(one, each, replace(THEIRS[each], **{field: WRONG[field]}) if each is side else THEIRS[each])
    with pytest.raises(HandshakeError) as raised:
        one.worker.greet(MINE)
    here, there = getattr(THEIRS[side], field), WRONG[field]
    if field == "settings":
        they = {Side.PREVIOUS: 0, Side.NEXT: 2}[side]
        told = f"stage 1 and stage {they} have different settings: optimizer.lr=0.1 here, optimizer.lr=0.2 there"
    else:
        told = f"stage 1 refuses its {side.value} stage: {field} is {there!r} there, {here!r} expected here"
    assert str(raised.value) == told


def test_another_number_of_settings_is_another_version(bench: Make) -> None:
    one = bench()
    says(one, Side.NEXT, replace(THEIRS[Side.NEXT], settings=SETTINGS[:1]))
    with pytest.raises(HandshakeError, match="stage 1 has 2 settings and stage 2 has 1: different versions"):
        one.worker.greet(MINE)


def test_a_neighbour_that_begins_with_something_else_is_refused(bench: Make) -> None:
    one = bench()
    says(one, Side.PREVIOUS, Activation(1, torch.zeros(4, 8), torch.zeros(4)))
    with pytest.raises(HandshakeError, match="the previous stage began with a Activation instead of a Hello"):
        one.worker.greet(MINE)


def test_a_neighbour_that_ends_instead_says_why(bench: Make) -> None:
    one = bench()
    says(one, Side.NEXT, Stop(0, "stage 2: no such file"))
    with pytest.raises(PeerStopped, match=r"^stage 2: no such file$"):
        one.worker.greet(MINE)


@pytest.mark.parametrize(
    ("greeted", "missing"),
    [([Side.NEXT], "previous"), ([Side.PREVIOUS], "next"), ([], "next and previous")],
    ids=["previous", "next", "both"],
)
def test_a_hello_that_does_not_come_names_the_side(bench: Make, greeted: list[Side], missing: str) -> None:
    one = bench(timeout=0.1)
    for side in greeted:
        says(one, side, THEIRS[side])
    with pytest.raises(WaitTimeout) as raised:
        one.worker.greet(MINE)
    assert str(raised.value) == f"stage 1 waited 0.1 s for the Hello of its {missing} stage (transport.timeout)"


def test_who_is_asked_to_end_does_not_wait_for_a_hello(bench: Make) -> None:
    one = bench(timeout=300.0)
    says(one, Side.PREVIOUS, THEIRS[Side.PREVIOUS])
    one.wire.late.append(one.worker.interrupt)
    with pytest.raises(WaitTimeout, match=r"^stage 1 was asked to end before its next stage said Hello$"):
        one.worker.greet(MINE)
