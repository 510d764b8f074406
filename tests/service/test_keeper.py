"""The loop of an independent stage whose neighbours come and go as the test says, all in one thread.

before ──► stage 1 of 3 ──► behind       FakeLinks: the same ends as of tests/worker, each with a switch
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dnipipe import worker
from dnipipe.errors import HandshakeError, MessageError, NonFiniteLoss, WaitTimeout
from dnipipe.messages import (
    Activation,
    Agreed,
    Answer,
    Checkpoint,
    Evaluation,
    Farewell,
    Gradient,
    Input,
    Message,
    Report,
    Stop,
)
from dnipipe.metrics import JsonLines
from dnipipe.service import keeper
from dnipipe.service.keeper import Keeper
from dnipipe.service.links import Event, Gone, Up
from dnipipe.stage import Stage
from dnipipe.transport import AT_EASE, Side
from dnipipe.transport.dropped import Dropped
from dnipipe.transport.local import pipeline
from dnipipe.window import Window
from tests.conftest import make_stages
from tests.worker.bench import NEVER, Watched, answer, batches, modules_of, said, synthetic

AGREED = Agreed(torch.tensor([1, 2, 3], dtype=torch.uint8))


class FakeLinks(Watched):
    """What Keeper asks of Links. `goes` and `comes` throw the switches."""

    last = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.events: deque[tuple[Side, Event]] = deque()
        self.there = dict.fromkeys(Side, True)
        self.dropped = Dropped()
        self.names = {side: f"the {side.value} stage" for side in Side}
        self.given_up: list[str] = []

    def up(self, side: Side) -> bool:
        return self.there[side]

    def goes(self, side: Side) -> None:
        self.there[side] = False
        self.events.append((side, Gone("it is gone")))

    def comes(self, side: Side) -> None:
        self.there[side] = True
        self.events.append((side, Up(None)))  # type: ignore[arg-type]

    def last_of(self, side: Side) -> int:
        return 0

    silent = slow = 0.0  # seconds, of who is `judged`
    judged = Side.NEXT

    def quiet(self, side: Side) -> float:
        return self.silent if side is self.judged else 0.0

    def longest(self, side: Side) -> float:
        return self.slow if side is self.judged else 0.0

    def give_up(self, side: Side, why: str) -> None:
        self.given_up.append(why)
        self.goes(side)

    def stood(self, seconds: float) -> None:
        self.silent -= seconds

    def send(self, side: Side, message: Message) -> None:
        if self.there[side]:
            super().send(side, message)
        else:
            self.dropped[type(message).__name__] += 1

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        return None if self.events else super().receive(sides, timeout, waiting)


class Book:
    """A ledger in memory."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: self.lines.append((name, *values))


class Stand:
    """Stage 1 of 3 as a Keeper; its neighbours are in the test's hands, and there."""

    def __init__(
        self,
        folder: Path,
        unguided: int,
        first: tuple[Side, Message] | None = None,
        stage: Stage | None = None,
        kind: Callable[..., Keeper] = Keeper,
    ) -> None:
        self.ends = pipeline(3, timeout=30.0)
        self.links, self.book = FakeLinks(self.ends[1]), Book()
        self.said, self.limits = list[str](), list[str]()
        stage = stage or make_stages(modules_of(3), synthetic, partial(torch.optim.SGD, lr=0.1))[1]
        self.log = JsonLines(folder / "stage-1.jsonl")

        def nothing(*_: object) -> None:
            pass

        self.keeper = kind(
            *(stage, self.links, Window(8), stage.metrics, self.log, nothing),
            links=self.links,
            ledger=self.book,
            agreement=AGREED,
            total=5,
            unguided=unguided,
            patience=30.0,
            silence=10.0,
            hung=60.0,
            save_own=nothing,
            over=lambda: self.links.log.append("over"),
            save_every=NEVER,
            alive=lambda limit: self.limits.append(str(limit)),
            say=self.said.append,
            first=first,
            report_every=NEVER,
        )
        self.clock = SimpleNamespace(now=0.0)
        self.keeper.absence.now = lambda: self.clock.now  # one that the test moves
        self.links.log.clear()

    def previous(self, *messages: Message) -> None:
        for message in messages:
            self.ends[0].send(Side.NEXT, message)

    def next(self, *messages: Message) -> None:
        for message in messages:
            self.ends[2].send(Side.PREVIOUS, message)

    def turn(self, times: int = 1) -> None:
        """The loop goes round: as in Worker.inbox, without an end."""
        for _ in range(times):
            self.links.late.append(self.links.wake)  # it never waits
            message = self.keeper._next()
            if message is not None:
                self.keeper._handle(message)

    def trained(self) -> list[int]:
        return [line[1] for line in self.book.lines if line[0] == "begun"]

    def alone(self) -> list[int]:
        return [line[1] for line in self.book.lines if line[0] == "alone"]


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Callable[[int], Stand]]:
    made: list[Stand] = []

    def make(unguided: int = 100, first: tuple[Side, Message] | None = None) -> Stand:
        made.append(Stand(tmp_path, unguided, first))
        return made[-1]

    yield make
    for each in made:
        each.log.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The loop's own, which the test moves."""
    made = SimpleNamespace(now=time.monotonic())
    for module in (keeper, worker):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def gradient(batch: int) -> Gradient:
    return Gradient(batch, torch.zeros(4, 8))


def test_it_trains_alone_as_long_as_it_may_and_then_takes_no_more(stand: Callable[[int], Stand]) -> None:
    one = stand(3)
    one.links.goes(Side.NEXT)
    one.previous(*batches(1, 5))
    one.turn(20)
    assert one.trained() == one.alone() == [1, 2, 3]
    assert one.keeper.stage.in_flight == 0
    assert one.links.log == [line for line in one.links.log if "to next" not in line]
    one.links.comes(Side.NEXT)
    one.turn(20)
    assert one.trained() == [1, 2, 3, 4, 5] and one.alone() == [1, 2, 3]
    assert one.links.log[-2:] != [] and "to next: Activation 5" in one.links.log


def test_what_was_under_way_is_answered_when_the_next_stage_goes(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.previous(*batches(1, 2))
    one.turn(4)
    assert one.keeper.stage.in_flight == 2
    one.links.goes(Side.NEXT)
    one.turn(4)
    assert one.keeper.stage.in_flight == 0
    assert ("gone", 2, "it is gone", [1, 2]) in one.book.lines
    assert one.keeper.metrics.skipped == {"no gradient came": 2}


def test_a_batch_whose_sending_shows_that_the_next_stage_is_gone_is_answered_once(
    stand: Callable[[int], Stand],
) -> None:
    one = stand(100)

    def before_send(side: Side, message: Message) -> None:
        if isinstance(message, Activation) and message.batch == 2:
            one.links.goes(side)

    one.links.before_send = before_send
    one.previous(*batches(1, 2))
    one.turn(8)
    assert one.trained() == [1, 2] and one.alone() == []
    assert ("gone", 2, "it is gone", [1, 2]) in one.book.lines
    assert one.keeper.stage.in_flight == 0 and one.keeper.metrics.skipped == {"no gradient came": 2}


def test_an_answer_to_what_another_process_asked_is_dropped(stand: Callable[[int], Stand]) -> None:
    """The next stage answers late, and over the new connection, what the one before this start had sent it."""
    one = stand(100)
    one.next(gradient(40), Answer(3, torch.zeros(4)))
    one.previous(*batches(41, 41))
    one.turn(6)
    assert one.links.dropped == {"an answer to what an older connection brought": 2}
    assert one.trained() == [41]


def blinks(one: Stand) -> None:
    """The next stage goes and comes in the middle of the next receive, which hands out a message all the same."""

    def blink() -> None:
        one.links.before_receive = lambda: None
        one.links.goes(Side.NEXT)
        one.links.comes(Side.NEXT)

    one.links.before_receive = blink


def test_a_gradient_that_comes_after_all_is_taken(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.previous(*batches(1, 1))
    one.turn(2)
    one.next(gradient(1))
    blinks(one)
    one.turn(4)
    assert one.keeper.stage.in_flight == 0 and one.keeper.metrics.skipped == {}


def test_what_goes_over_the_new_connection_stands_behind_the_agreement_and_is_not_lost(
    stand: Callable[[int], Stand],
) -> None:
    one = stand(100)
    one.previous(*batches(1, 1))
    blinks(one)
    one.turn(2)
    assert [line for line in one.links.log if "to next" in line] == ["to next: Agreed", "to next: Activation 1"]
    assert ("gone", 2, "it is gone", []) in one.book.lines and one.keeper.stage.in_flight == 1


def test_a_checkpoint_that_the_next_stage_misses_is_counted(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.links.goes(Side.NEXT)
    one.previous(*batches(1, 1), Checkpoint(1))
    one.turn(4)
    assert one.links.dropped == {"Checkpoint": 1}


def test_an_evaluation_under_way_is_answered_as_lost(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.previous(Evaluation(7, torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)))
    one.turn(2)
    one.links.goes(Side.NEXT)
    one.turn(3)
    answers = [got[1] for _ in range(9) if (got := one.ends[0].receive([Side.NEXT], 0.0))]
    assert [(type(each), each.batch, each.h.numel()) for each in answers if isinstance(each, Answer)] == [
        (Answer, 7, 0)
    ]


def test_silence_is_judged_when_all_that_had_come_is_heard(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.links.silent = 11.0  # of 10
    one.previous(*batches(1, 1))
    one.turn(1)
    assert one.links.up(Side.NEXT) and one.trained() == [1]
    one.turn(1)
    assert not one.links.up(Side.NEXT)


@pytest.mark.parametrize(("side", "number"), [(Side.NEXT, 2), (Side.PREVIOUS, 0)])
@pytest.mark.parametrize(
    ("slow", "most", "why"),
    [
        (0.0, 10.0, "service.silence"),
        (2.0, 10.0, "service.silence"),
        (5.0, 20.0, "4 times its longest silence of late, 5 s"),
        (20.0, 61.0, "service.hung, and 1 s"),
    ],
)
def test_who_was_slow_may_be_so_again_but_not_for_longer_than_a_process_lives(
    stand: Callable[[int], Stand], slow: float, most: float, why: str, side: Side, number: int
) -> None:
    """A cut of 20 s is no reason to wait 80 s in the next one: a loop that stands for 60 s (hung) ends itself."""
    one = stand(100)
    one.links.judged, one.links.slow = side, slow
    one.links.silent = most - 0.1
    one.turn(1)
    assert one.links.up(side)
    one.links.silent = most + 0.1
    one.turn(1)
    assert one.links.given_up == [f"stage {number} has said nothing for {most:.0f} s ({why}): it hangs"]
    one.turn(1)
    assert one.book.lines[-1][:2] == ("gone", number)


def test_at_the_end_nobody_is_judged_from_whom_nothing_more_is_needed(stand: Callable[[int], Stand]) -> None:
    """Stage 0 writes its summary before its farewell, which would be dropped if it counted as away."""
    one = stand(100)
    one.keeper.stopping = True
    one.links.judged, one.links.silent = Side.PREVIOUS, 1000.0
    one.turn(2)
    one.keeper.finished, one.links.judged = True, Side.NEXT
    one.turn(2)
    assert one.links.given_up == []
    one.keeper.finished = False
    one.turn(1)
    assert len(one.links.given_up) == 1


def test_its_own_limit_follows_what_its_steps_took(stand: Callable[[int], Stand], clock: SimpleNamespace) -> None:
    """The first one took 70 s, with service.hung = 60."""
    one = stand(100)

    def slowly(side: Side, message: Message) -> None:
        clock.now += 70.0 * isinstance(message, Activation)

    one.links.before_send = slowly
    one.limits.clear()
    one.previous(*batches(1, 1))
    one.turn(2)
    first = "300 s (5 times service.hung, for the first of its kind)"
    learnt = "280 s (4 times its longest step of late, 70 s)"
    assert one.limits == ["60 s (service.hung)", first, learnt]
    one.limits.clear()
    one.previous(*batches(2, 2), evaluation(1))
    one.turn(2)
    assert one.limits == [learnt, learnt, learnt, first]


def test_it_says_how_many_batches_are_left_to_train_without_the_next_stage(
    stand: Callable[[int], Stand], clock: SimpleNamespace
) -> None:
    one = stand(4)
    one.links.goes(Side.NEXT)
    one.previous(*batches(1, 5))
    one.turn(1)
    one.said.clear()
    for _ in range(12):  # turns of a second
        clock.now += 1.0
        one.turn(1)
    told = "stage 2 is away: {} batches left to train without it".format
    assert one.said == [told(3), told(1), told(0)]
    one.links.comes(Side.NEXT)
    one.turn(1)
    assert one.said[-1] == "stage 2 is there, after 4 batches without it"


def test_who_returns_is_fed_at_once_with_the_newest_batch_and_with_none_from_before(
    stand: Callable[[int], Stand],
) -> None:
    """Nothing is kept for a stage that is away: a queue of length zero that drops the oldest first."""
    one = stand(100)
    one.previous(*batches(1, 4))
    one.turn(2)
    one.links.goes(Side.NEXT)
    one.turn(9)
    assert one.trained() == [1, 2, 3, 4] and one.alone() == [3, 4]
    while one.ends[2].receive([Side.PREVIOUS], 0.0):  # of the connection that ended
        pass
    one.links.comes(Side.NEXT)
    one.previous(*batches(5, 5))
    one.turn(2)
    heard = [got[1] for _ in range(9) if (got := one.ends[2].receive([Side.PREVIOUS], 0.0))]
    assert [said(each) for each in heard] == ["Agreed", "Activation 5"]


def test_that_this_stage_stood_still_itself_is_not_the_other_ones_silence(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.links.silent = 11.0
    one.keeper._turned -= 5.0
    one.turn(2)
    assert one.links.up(Side.NEXT) and one.links.silent < 7


def test_who_comes_is_told_what_it_missed(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.links.goes(Side.NEXT)
    one.previous(*batches(1, 1))
    one.turn(3)
    one.keeper.stopping = True
    one.links.comes(Side.NEXT)
    one.turn(1)
    heard = [got[1] for _ in range(9) if (got := one.ends[2].receive([Side.PREVIOUS], 0.0))]
    assert [type(each) for each in heard] == [Agreed, Agreed, Stop]  # at the start, and anew


def evaluation(number: int) -> Evaluation:
    return Evaluation(number, torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64))


def test_evaluations_of_the_end_that_are_lost_again_and_again_do_not_make_it_wait_for_ever(
    stand: Callable[[int], Stand],
) -> None:
    one = stand(100)
    one.links.goes(Side.NEXT)
    one.previous(*batches(1, 5))  # the run's last one among them
    one.turn(12)
    with pytest.raises(WaitTimeout, match=r"^stage 1 waited 30 s for stage 2, which is away"):
        for number in range(1, 20):
            one.clock.now += 2.0
            one.previous(evaluation(number))
            one.turn(3)
    assert one.trained() == [1, 2, 3, 4, 5] and one.clock.now == 30.0


def test_as_long_as_it_trains_alone_it_does_not_wait(stand: Callable[[int], Stand]) -> None:
    """And evaluations before the end belong to that."""
    one = stand(100)
    one.links.goes(Side.NEXT)
    for batch in range(1, 4):
        one.clock.now += 20.0
        one.previous(*batches(batch, batch))
        one.turn(3)
        one.clock.now += 20.0
        one.previous(evaluation(batch))
        one.turn(3)
    assert one.trained() == one.alone() == [1, 2, 3]


def test_reports_from_behind_do_not_hide_that_the_stage_before_is_away(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.links.goes(Side.PREVIOUS)
    with pytest.raises(WaitTimeout, match=r"^stage 1 waited 30 s for stage 0, which is away"):
        for _ in range(20):
            one.turn(2)
            one.clock.now += 2.0
            one.next(Report(2, 0, {}))


def test_at_the_end_the_stage_before_is_not_needed(stand: Callable[[int], Stand]) -> None:
    """What it still owes is its farewell, and that has a limit of its own."""
    one = stand(100)
    one.keeper.stopping = True
    one.links.goes(Side.PREVIOUS)
    one.turn(2)
    one.clock.now += 100.0
    one.turn(2)


@pytest.mark.parametrize(
    "wrong",
    [
        Gradient(2, torch.zeros(4, 7)),
        Gradient(2, torch.zeros(3, 8)),
        Gradient(2, torch.zeros(1, 8), samples=torch.tensor([4])),
        Gradient(2, torch.zeros(1, 8), samples=torch.tensor([0.0])),
    ],
)
def test_a_gradient_that_does_not_fit_its_batch_costs_the_next_stage_its_connection(
    stand: Callable[..., Stand], wrong: Gradient
) -> None:
    """And what it owed is answered as when it had died: the stage before gets its answer, and every batch its place."""
    one = stand(100)
    one.previous(*batches(1, 3))
    one.turn(3)
    one.next(wrong)
    one.turn(1)
    assert one.links.dropped == {"not as agreed": 1} and not one.links.up(Side.NEXT)
    assert one.links.given_up == [
        "the next stage sent what was not agreed on: stage 1 did not ask for this gradient of batch 2"
    ]
    one.turn(5)
    assert one.keeper.stage.in_flight == 0 and one.keeper.metrics.skipped == {"no gradient came": 3}
    assert [line[3] for line in one.book.lines if line[0] == "gone"] == [[1, 2, 3]]
    one.links.comes(Side.NEXT)
    one.previous(*batches(4, 4))
    one.turn(3)
    assert one.trained() == [1, 2, 3, 4] and one.alone() == []


def test_a_batch_that_was_trained_already_is_not_begun_again(stand: Callable[..., Stand]) -> None:
    one = stand(100)
    one.previous(*batches(1, 2), *batches(1, 1))
    one.turn(5)
    assert one.trained() == [1, 2] and one.links.dropped == {"not as agreed": 1}
    assert one.links.given_up == ["the previous stage sent what was not agreed on: batch 1 came after batch 2"]


def test_a_kind_of_message_that_this_stage_has_no_use_for_is_dropped(stand: Callable[..., Stand]) -> None:
    one = stand(100)
    one.previous(Input(1, torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)))
    one.turn(2)
    assert one.links.dropped == {"not as agreed": 1} and not one.links.up(Side.PREVIOUS)


def test_what_is_too_large_to_be_sent_is_nobody_elses_fault(stand: Callable[..., Stand]) -> None:
    one = stand(100)

    def too_large(side: Side, message: Message) -> None:
        if isinstance(message, Activation):
            raise MessageError("raise transport.max_message")

    one.links.before_send = too_large
    one.previous(*batches(1, 1))
    with pytest.raises(MessageError, match=r"max_message"):
        one.turn(2)


@pytest.mark.parametrize(
    ("error", "told"),
    [(NonFiniteLoss("the loss is nan"), True), (RuntimeError("a crash, after which it comes back"), False)],
)
def test_a_nan_that_is_to_stop_the_run_stops_the_others(
    stand: Callable[..., Stand], error: Exception, told: bool
) -> None:
    one = stand(100)

    def fails(module: torch.nn.Module, inputs: object) -> None:
        raise error

    one.keeper.stage.module.register_forward_pre_hook(fails)
    one.previous(*batches(1, 1))
    with pytest.raises(type(error)):
        one.keeper.run()
    for end, side in ((0, Side.NEXT), (2, Side.PREVIOUS)):
        heard = [got[1] for _ in range(9) if (got := one.ends[end].receive([side], 0.0))]
        assert [each.reason for each in heard if isinstance(each, Stop)] == [f"stage 1: {error}"] * told


def test_the_agreement_of_another_run_is_refused(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.previous(Agreed(torch.tensor([9], dtype=torch.uint8)))
    with pytest.raises(HandshakeError, match="stage 1 belongs to another run than stage 0"):
        one.turn(2)


def test_a_last_report_that_was_heard_before_the_loop_began_counts(stand: Callable[..., Stand]) -> None:
    """Whoever said it does not say it again: this stage would wait for it, and that one for the farewell."""
    one = stand(100, (Side.NEXT, Report(2, 5, final=True)))
    one.previous(Stop(5), Farewell(5))
    one.keeper.run()
    reports = [got[1] for _ in range(9) if (got := one.ends[0].receive([Side.NEXT], 0.0))]
    assert [each.stage for each in reports if isinstance(each, Report) and each.final] == [2, 1]


def test_the_end_waits_for_the_farewell_and_hands_it_on(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.previous(*batches(1, 1), Stop(1), Farewell(1))

    def reply(side: Side, message: Message) -> None:
        if side is Side.NEXT and (word := answer(message)):
            one.next(word)

    one.links.after_send = reply
    one.keeper.run()
    assert one.links.log[-2:] == ["over", "to next: Farewell 1"]
    assert ("ended",) in one.book.lines


def test_who_comes_back_at_the_end_is_waited_for_as_long_as_ever(
    stand: Callable[..., Stand], clock: SimpleNamespace
) -> None:
    """Stage 0 died before its summary; it is back within the limit, evaluates, and dies and comes once more."""
    one = stand(100)

    def jump(then: Callable[[], object]) -> Callable[[], None]:
        def later() -> None:
            clock.now += 20.0  # of 30
            then()
            one.links.wake()

        return later

    def returns() -> None:
        one.links.goes(Side.PREVIOUS)
        one.links.comes(Side.PREVIOUS)

    steps = [returns, lambda: one.previous(evaluation(1)), returns, lambda: one.previous(Farewell(5))]
    one.previous(Stop(5))
    one.next(Report(2, 5, final=True))

    def begins() -> None:
        if one.keeper.finished and not one.links.late and steps:
            one.links.late.append(jump(steps.pop(0)))

    one.links.before_receive = begins
    one.links.after_send = lambda side, message: [
        one.next(word) for word in [answer(message)] if word and side is Side.NEXT and isinstance(message, Evaluation)
    ]
    one.keeper.run()
    assert "over" in one.links.log and steps == []


def test_without_a_farewell_the_run_is_not_known_to_be_over(stand: Callable[[int], Stand]) -> None:
    one = stand(100)
    one.keeper.patience, one.keeper.timeout = 0.05, 0.5
    one.previous(*batches(1, 1), Stop(1))
    one.links.after_send = lambda side, message: [
        one.next(word) for word in [answer(message)] if word and side is Side.NEXT
    ]
    one.keeper.run()
    assert "over" not in one.links.log and ("ended",) in one.book.lines
    assert "stage 0 has not said for 0.05 s that the run is over" in one.said[-1]
