"""The loop of a stage that guesses its inputs, whose neighbours come and go as the test says (see test_keeper.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dnipipe.messages import Activation, Gradient, Input, Stop
from dnipipe.service.drawing import Draws
from dnipipe.service.guessing import LATE, GuessingKeeper
from dnipipe.transport import Side
from tests.conftest import blobs
from tests.service.test_keeper import Stand
from tests.test_unlocked import fixed, unlocked

DATA = list(blobs(5))  # of batches 1 to 5, the whole run


def drawing(start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    for batch in range(start, 5):
        yield batch + 1, *DATA[batch]


def sent(batch: int) -> Input:
    return Input(batch, *DATA[batch - 1])


def real(batch: int) -> Activation:
    return Activation(batch, torch.randn(16, 12), DATA[batch - 1][1])


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Callable[..., Stand]]:
    made: list[Stand] = []

    def make(unguided: int = 100) -> Stand:
        draws = Draws(drawing, unguided, lambda line: made[-1].said.append(line))
        made.append(Stand(tmp_path, unguided, stage=unlocked(fixed)[1], kind=partial(GuessingKeeper, draws=draws)))
        return made[-1]

    yield make
    for each in made:
        each.log.close()


def to_next(one: Stand) -> list[str]:
    return [line.removeprefix("to next: ") for line in one.links.log if line.startswith("to next")]


def heard_by_previous(one: Stand) -> list[tuple[int, bool]]:
    """(batch, whether there was a gradient) of each answer."""
    heard = [got[1] for _ in range(9) if (got := one.ends[0].receive([Side.NEXT], 0.0))]
    return [(each.batch, each.g is not None) for each in heard if isinstance(each, Gradient)]


def test_with_both_neighbours_there_it_trains_what_comes(stand: Callable[..., Stand]) -> None:
    one = stand()
    one.previous(sent(1), real(1), sent(2), real(2))
    one.turn(6)
    begun = [line for line in one.book.lines if line[0] == "begun"]
    assert (
        one.links.dropped == {}
        and begun == [("begun", 1, False), ("begun", 2, False)]
        and one.keeper.stage.updates == 2
    )
    assert to_next(one) == ["Input 1", "Activation 1", "Input 2", "Activation 2"]
    assert heard_by_previous(one) == [(1, True), (2, True)]


def test_while_the_stage_before_is_away_it_draws_as_many_batches_as_it_may(stand: Callable[..., Stand]) -> None:
    one = stand(2)
    one.previous(sent(1), real(1))
    one.turn(3)
    one.links.goes(Side.PREVIOUS)
    one.turn(9)
    assert [line for line in one.book.lines if line[0] == "begun"] == [
        ("begun", 1, False),
        ("begun", 2, True),
        ("begun", 3, True),
    ]
    assert to_next(one)[2:] == ["Input 2", "Activation 2", "Input 3", "Activation 3"]
    assert one.keeper.stage.updates == 3 and "going on with 2 batches that are drawn here" in one.said[-2]
    assert one.said[-1] == "stage 0 is away: 1 batches left to train without it"


def test_it_does_not_draw_behind_the_runs_last_batch_or_when_it_is_to_stop(stand: Callable[..., Stand]) -> None:
    one = stand()
    one.previous(sent(4), real(4))
    one.turn(3)
    one.links.goes(Side.PREVIOUS)
    one.turn(9)
    assert one.trained() == [4, 5]
    other = stand()
    other.previous(sent(1), real(1), Stop(1))
    for _ in range(4):
        message = other.keeper._next()
        if isinstance(message, Stop):
            other.keeper._stop(message)
        elif message:
            other.keeper._handle(message)
    other.links.goes(Side.PREVIOUS)
    other.turn(5)
    assert other.trained() == [1]


def test_what_comes_late_is_answered_and_not_trained_on_again(stand: Callable[..., Stand]) -> None:
    one = stand(3)
    one.previous(sent(1), real(1))
    one.turn(3)
    one.links.goes(Side.PREVIOUS)
    one.turn(9)
    one.links.comes(Side.PREVIOUS)
    heard_by_previous(one)
    one.previous(sent(3), real(3), sent(4), real(4), sent(5), real(5))
    one.turn(9)
    assert one.trained() == [1, 2, 3, 4, 5] and one.links.dropped[LATE] == 3  # two inputs, one activation
    assert heard_by_previous(one) == [(3, False), (4, False), (5, True)]
    assert "3 batches were drawn here meanwhile" in one.said and one.links.given_up == []


def test_an_input_that_does_not_fit_costs_its_sender_the_connection(stand: Callable[..., Stand]) -> None:
    one = stand()
    one.previous(Input(1, torch.zeros(16, 9), DATA[0][1]))
    one.turn(2)
    assert len(one.links.given_up) == 1 and "the network's input is float32 [16, 9]" in one.links.given_up[0]
    assert one.trained() == []


def test_an_activation_without_its_input_costs_it_too(stand: Callable[..., Stand]) -> None:
    one = stand()
    one.previous(real(1))
    one.turn(2)
    assert len(one.links.given_up) == 1 and "had no input of batch 1" in one.links.given_up[0]


def test_while_the_next_stage_is_away_each_batch_is_answered_here_once(stand: Callable[..., Stand]) -> None:
    one = stand(3)
    one.links.goes(Side.NEXT)
    one.previous(*(each for batch in range(1, 6) for each in (sent(batch), real(batch))))
    one.turn(20)
    assert one.trained() == one.alone() == [1, 2, 3]
    assert one.keeper.stage.in_flight == 0 and one.keeper.metrics.skipped == {"no gradient came": 3}


def test_a_batch_of_which_the_next_stage_has_only_the_input_is_answered_too(stand: Callable[..., Stand]) -> None:
    """It goes before the activation is sent."""
    one = stand()
    one.links.after_send = lambda side, message: isinstance(message, Input) and one.links.goes(side)
    one.previous(sent(1), real(1))
    one.turn(4)
    assert one.trained() == [1] and one.keeper.stage.in_flight == 0
    assert one.keeper.metrics.skipped == {"no gradient came": 1}
