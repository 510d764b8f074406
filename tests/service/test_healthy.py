"""What `dnipipe stage --healthy` calls healthy: a stage that gets on with what it has to do, or has nothing to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dnipipe.messages import Message
from dnipipe.service.place import Place, unhealthy
from dnipipe.transport import Side
from tests.service.test_keeper import Stand
from tests.worker.bench import batches


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.taken(tmp_path, 1)


@pytest.fixture
def stand(tmp_path: Path, place: Place) -> Iterator[Stand]:
    """Stage 1 of 3; without the next one it trains two batches."""
    one = Stand(tmp_path, unguided=2)
    one.keeper.alive = place.touch
    yield one
    one.log.close()


def stood(place: Place) -> None:
    """It is 100 s later, and the loop has not come round."""
    past = time.time() - 100
    os.utime(place.folder / "alive", (past, past))


def for_a_batch(one: Stand) -> None:
    one.previous(*batches(1, 1))


def for_an_answer(one: Stand) -> None:
    """The window is full."""
    one.previous(*batches(1, 12))


def for_the_next_stage(one: Stand) -> None:
    """It has trained all that it may without."""
    one.links.goes(Side.NEXT)
    one.previous(*batches(1, 3))


@pytest.mark.parametrize(("waits", "trained"), [(for_a_batch, 1), (for_an_answer, 8), (for_the_next_stage, 2)])
def test_a_stage_that_only_waits_is(
    stand: Stand, place: Place, tmp_path: Path, waits: Callable[[Stand], None], trained: int
) -> None:
    waits(stand)
    stand.turn(20)
    stood(place)
    stand.turn()
    assert unhealthy(tmp_path, 1, 60.0) == ""
    assert len(stand.trained()) == trained


def test_a_stage_that_does_not_get_on_with_a_batch_is_not(stand: Stand, place: Place, tmp_path: Path) -> None:
    """Its activation goes down late, and then the gradient up: still the same turn. The second, for the first may take
    longer."""
    found: list[str] = []
    stand.previous(*batches(1, 1))
    stand.turn()

    def late(side: Side, message: Message) -> None:
        if not found:
            stood(place)
        found.append(unhealthy(tmp_path, 1, 60.0))

    stand.links.before_send = late
    stand.previous(*batches(2, 2))
    stand.turn()
    assert found == 2 * ["stage 1 has not moved for 100 s, its limit is 60 s (service.hung)"]
    stand.turn()
    assert unhealthy(tmp_path, 1, 60.0) == ""
