"""What a stage draws while the stage before it is away: the run's own batches, behind what came, and only those."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dnipipe.messages import Input
from dnipipe.service.drawing import Draws


def batch(number: int) -> Input:
    return Input(number, torch.full((4, 2), float(number)), torch.full((4,), number))


def drawing(start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of a run of 9."""
    for number in range(start + 1, 10):
        yield number, batch(number).x, batch(number).y


def made(most: int) -> tuple[Draws, list[str]]:
    said: list[str] = []
    return Draws(drawing, most, said.append), said


def ids(draws: Draws, behind: int, count: int) -> list[int | None]:
    found: list[int | None] = []
    for _ in range(count):
        drawn = draws.next(behind)
        found.append(drawn and drawn.batch)
        behind = drawn.batch if drawn else behind
    return found


def test_it_goes_on_behind_what_the_stage_trained_for_so_many_batches() -> None:
    draws, said = made(3)
    draws.came(batch(4))
    drawn = draws.next(5)  # it has trained 5 in an absence before
    assert drawn and torch.equal(drawn.x, batch(6).x) and torch.equal(drawn.y, batch(6).y)
    assert ids(draws, 6, 3) == [7, 8, None] and (draws.left, draws.last, said) == (0, 8, [])


def test_each_absence_counts_for_itself() -> None:
    draws, _ = made(2)
    draws.came(batch(1))
    assert ids(draws, 1, 3) == [2, 3, None]
    draws.came(batch(5))
    assert draws.left == 2 and ids(draws, 5, 3) == [6, 7, None]


def test_there_is_nothing_behind_the_last_batch() -> None:
    draws, _ = made(5)
    draws.came(batch(8))
    assert ids(draws, 8, 2) == [9, None] and draws.left == 4


def test_nothing_is_drawn_before_anything_has_come() -> None:
    """Whether the data are the same is not known."""
    draws, said = made(5)
    assert draws.left == 0 and draws.next(0) is None and said == []


def test_with_other_data_than_came_nothing_is_drawn_and_it_is_said_once() -> None:
    for other in (
        Input(4, batch(4).x + 1, batch(4).y),
        Input(4, batch(4).x, batch(4).y + 1),
        Input(4, batch(4).x.double(), batch(4).y),
        Input(10, batch(10).x, batch(10).y),  # there is no such batch
    ):
        draws, said = made(5)
        draws.came(other)
        assert ids(draws, other.batch, 2) == [None, None] and draws.left == 0
        assert len(said) == 1 and f"what is drawn here for batch {other.batch} is not what came: data.root" in said[0]
