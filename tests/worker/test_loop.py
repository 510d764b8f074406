"""The loop: what goes where, who is heard first, how much is taken, and how it ends when all goes well.

before ──Activation Evaluation Checkpoint Stop──► stage 1 ──► behind
       ◄──Gradient Answer Saved Report─────────          ◄──
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from dnipipe.gradient_rules import GradientRule, Synthetic
from dnipipe.inputs import Inputs
from dnipipe.learner import Learner
from dnipipe.messages import Activation, Answer, Checkpoint, Evaluation, Gradient, Input, Message, Report, Saved, Stop
from dnipipe.predictors import VFBN
from dnipipe.transport import Side
from dnipipe.unlocked import UnlockedStage
from dnipipe.window import Window
from tests.worker.bench import Bench, Crew, Script, batches, synthetic, wait

Make = Callable[..., Bench]
X, Y = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)


def gradient(batch: int, starved: bool = False) -> Gradient:
    return Gradient(batch, torch.zeros(4, 8), starved)


# -- what goes where ---------------------------------------------------------------------------------------------


def test_batches_and_markers_go_on_and_the_rest_goes_back(bench: Make) -> None:
    one = bench().next_answers()
    one.previous(*batches(1, 1), Evaluation(1, X, Y), Checkpoint(1), Stop(1))
    one.worker.run()
    assert one.wire.log == [
        "from previous: Activation 1",
        "to next: Activation 1",
        "from next: Gradient 1",
        "to previous: Gradient 1",
        "from previous: Evaluation 1",
        "to next: Evaluation 1",
        "from next: Answer 1",
        "to previous: Answer 1",
        "from previous: Checkpoint 1",
        "to next: Checkpoint 1",
        "saved 1",
        "to previous: Saved 1 of 1",
        "from next: Saved 1 of 2",
        "to previous: Saved 1 of 2",
        "from previous: Stop 1",
        "to next: Stop 1",
        "from next: Report 1 of 2 final",
        "to previous: Report 1 of 2 final",
        "to previous: Report 1 of 1",
        "to previous: Report 1 of 1 final",
    ]


def test_the_next_stage_is_heard_first(bench: Make) -> None:
    """What comes from there frees the window, and teaches."""
    one = bench().next_answers()
    one.previous(*batches(1, 1), Stop(1))
    one.next(Saved(0, 2), Report(2, 0))
    one.worker.run()
    assert one.log("from ")[:3] == ["next: Saved 0 of 2", "next: Report 0 of 2", "previous: Activation 1"]


def test_what_is_put_off_is_learnt_when_there_is_nothing_to_do(bench: Make) -> None:
    """Three gradients are too many to be put off: the newest is learnt, two are not. One waits until all is done."""
    learner = Learner(VFBN(nn.Linear(8, 3), F.cross_entropy, 0.1), 1e-3, lazily=3)
    one, waiting = bench(rule=lambda k: Synthetic(learner), window=5).next_answers(), []
    one.wire.before_receive = lambda: waiting.append(len(learner.put_off))
    one.wire.late.append(lambda: one.previous(Stop(4)))
    one.previous(*batches(1, 4))
    one.worker.run()
    assert waiting[:10] == [0, 0, 1, 1, 2, 2, 0, 0, 1, 0]  # activation, gradient, …, and then a look, and a wait
    assert one.worker.metrics.totals()["unlearnt"] == 2


def test_at_stage_0_the_head_takes_what_comes_back(bench: Make) -> None:
    script = Script([*batches(1, 1), Checkpoint(1)])
    one = bench(index=0, head=script).next_answers()
    one.next(Report(1, 0))
    one.next(Report(2, 0, final=True))  # the last stage may be long done with a batch that is on its way here
    one.worker.run()
    assert one.log("to previous") == []
    assert [type(message) for message in script.taken] == [Report, Report, Saved, Saved, Report, Report, Report]
    assert script.finals() == [2, 2, 0]


def test_a_final_report_that_overtakes_a_gradient_counts(bench: Make) -> None:
    one = bench(window=2)
    one.previous(*batches(1, 1), Stop(1))
    one.wire.late.append(lambda: one.next(Report(2, 1, final=True), gradient(1)))
    one.worker.run()
    assert one.log("to previous: ") == [
        "Report 1 of 2 final",
        "Gradient 1",
        "Report 1 of 1",
        "Report 1 of 1 final",
    ]


# -- the window --------------------------------------------------------------------------------------------------


def test_a_full_window_takes_nothing_from_before(bench: Make) -> None:
    one = bench(rule=synthetic, window=3)
    one.previous(*batches(1, 5), Stop(5))
    seen: list[tuple[int, tuple[Side, ...]]] = []

    def then(*messages: Message) -> Callable[[], None]:
        def waiting() -> None:
            seen.append((len(one.log("from previous: Activation")), one.wire.asked[-1]))
            one.next(*messages)

        return waiting

    one.wire.late.extend([then(gradient(1)), then(gradient(2), gradient(3)), then(gradient(4), gradient(5))])
    one.wire.late.append(then(Report(2, 5, final=True)))
    one.worker.run()
    assert seen == [(3, (Side.NEXT,)), (4, (Side.NEXT,)), (5, (Side.NEXT,)), (5, (Side.NEXT,))]


def test_an_evaluation_takes_its_place_in_the_window(bench: Make) -> None:
    one = bench(window=2)
    one.previous(Evaluation(1, X, Y), Evaluation(2, X, Y), Evaluation(3, X, Y), Stop(0))
    seen: list[int] = []

    def waiting() -> None:
        seen.append(len(one.log("from previous: Evaluation")))
        one.next_answers().next(*(Answer(number, torch.zeros(4)) for number in (1, 2)))

    one.wire.late.append(waiting)
    one.worker.run()
    assert seen == [2]


def test_a_full_window_asks_the_script_for_nothing(bench: Make) -> None:
    script = Script(batches(1, 5))
    one = bench(index=0, head=script, rule=synthetic, window=2)
    seen: list[int] = []

    def waiting() -> None:
        seen.append(script.asked)
        one.next(gradient(len(seen)))

    one.wire.late.extend([waiting] * 5)
    one.wire.late.append(lambda: one.next(Report(1, 5, final=True), Report(2, 5, final=True)))
    one.worker.run()
    assert seen == [2, 3, 4, 5, 6]  # the sixth is Stop


@pytest.mark.parametrize(
    ("late", "starved", "size"), [(True, True, 4), (True, False, 2), (False, True, 2)], ids=["both", "late", "starved"]
)
def test_an_automatic_window_grows_if_both_ends_were_idle(bench: Make, late: bool, starved: bool, size: int) -> None:
    """This stage, waiting with its window full, and the next one, starved for the batch that it now answers."""
    one = bench(rule=synthetic, window=Window(None))
    one.previous(*batches(1, 2), Stop(2))

    def answers() -> None:
        one.next(gradient(1, starved), gradient(2), Report(2, 2, final=True))

    def at_once(side: Side, message: Message) -> None:
        if isinstance(message, Activation) and message.batch == 2:
            answers()

    if late:
        one.wire.late.append(answers)
    else:
        one.wire.after_send = at_once
    one.worker.run()
    assert one.worker.window.size == size


# -- starved -----------------------------------------------------------------------------------------------------


def test_a_gradient_says_that_its_activation_was_waited_for(bench: Make) -> None:
    """And only that one: the batch that lay behind it was there in time."""
    one = bench().next_answers()
    one.previous(*batches(1, 1))
    one.wire.late.append(lambda: one.previous(*batches(2, 3)))
    one.wire.late.append(lambda: one.previous(Stop(3)))
    one.worker.run()
    sent = [message for message in one.heard(Side.PREVIOUS) if isinstance(message, Gradient)]
    assert [(message.batch, message.starved) for message in sent] == [(1, False), (2, True), (3, False)]


def test_unlocked_it_is_the_input_that_was_waited_for(bench: Make) -> None:
    """The activation behind it may be late: nobody answers that one."""
    guess = Inputs(torch.nn.Linear(8, 8), (4, 8), "float32", 0, 1e-3)
    one = bench(rule=synthetic, kind=lambda k: partial(UnlockedStage, guess)).next_answers()

    def one_batch(x: Activation) -> list[Callable[[], None]]:
        return [lambda: one.previous(Input(x.batch, x.x, x.y)), lambda: one.previous(x)]

    one.wire.late.extend([*one_batch(batches(1, 1)[0]), *one_batch(batches(2, 2)[0])])
    one.wire.late.append(lambda: one.previous(*(Input(3, X, Y), Activation(3, X, Y)), Stop(3)))
    one.worker.run()
    sent = [message for message in one.heard(Side.PREVIOUS) if isinstance(message, Gradient)]
    assert [(message.batch, message.starved) for message in sent] == [(1, True), (2, True), (3, True)]
    assert one.worker._starved == set() and one.worker._heard[Side.PREVIOUS] == 3
    assert one.log("to next: ")[:3] == ["Input 1", "Activation 1", "Input 2"]


# -- a whole run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(("rule", "window"), [(wait, 1), (synthetic, 3)], ids=["wait", "synthetic"])
def test_a_run_ends_in_order_with_all_that_is_owed(
    tmp_path: Path, stages: int, rule: Callable[[int], GradientRule], window: int
) -> None:
    """Every stage saves, and reports for the last time; stage 0 is the last of them, so it has all."""
    script = Script([*batches(1, 6), Evaluation(1, X, Y), Checkpoint(6), *batches(7, 8)])
    crew = Crew(tmp_path, script, stages, rule, window=window)
    peak = [0] * stages

    def look(k: int) -> None:
        peak[k] = max(peak[k], crew.workers[k].stage.in_flight)

    for k, wire in enumerate(crew.wires):
        wire.before_receive = partial(look, k)
    assert crew.run() == [None] * stages
    assert sorted(script.finals()) == list(range(stages))
    last = script.taken[-1]
    assert isinstance(last, Report) and last.final and last.stage == 0
    final = [message for message in script.taken if isinstance(message, Report) and message.final]
    assert all(message.numbers["batches"] == 8 and message.batch == 8 for message in final)
    assert sorted(message.stage for message in script.taken if isinstance(message, Saved)) == list(range(stages))
    assert all(wire.log.count("saved 6") == 1 for wire in crew.wires)
    assert [type(message) for message in script.taken].count(Answer) == 1
    assert all(0 < most <= window for most in peak[:-1]) and peak[-1] == 0
    for k in range(stages):
        lines = [json.loads(line) for line in (tmp_path / f"stage-{k}.jsonl").read_text().splitlines()]
        assert [line["batch"] for line in lines] == [8]


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """No polling: one look into the inbox for each message that came; at stage 0, one more for each that was fed."""
    script = Script(batches(1, 50))
    crew = Crew(tmp_path, script, 3, synthetic, window=4)
    assert crew.run() == [None] * 3
    assert [len(wire.asked) for wire in crew.wires[1:]] == [wire.got for wire in crew.wires[1:]]
    assert script.asked == 51 and len(crew.wires[0].asked) <= crew.wires[0].got + script.asked


def test_a_script_that_waits_for_an_answer_is_asked_again_when_something_came(bench: Make) -> None:
    """It writes a text, say, each byte of which is an answer."""
    script = Script([Evaluation(1, X, None), None])
    one = bench(index=0, head=script, window=4)
    seen: list[int] = []

    def waiting(*messages: Message) -> Callable[[], None]:
        def says() -> None:
            seen.append(script.asked)
            one.next(*messages)

        return says

    one.wire.late.extend([waiting(Report(2, 0)), waiting(Answer(1, torch.zeros(4, 3)))])
    one.wire.late.append(waiting(Report(1, 0, final=True), Report(2, 0, final=True)))
    one.worker.run()
    assert seen == [2, 3, 4]
