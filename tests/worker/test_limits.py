"""What is due while a stage waits: a report, the limit of a wait, the limit of an interrupted run. A limit says whom
it waited for, how long, and the last batch id of both.

        ┌─ wait ──────────────┐
    ────┤   report   report   ├──► message, or WaitTimeout
        └──────┴────────┴─────┘
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dnipipe import worker as module
from dnipipe.errors import PeerLost, WaitTimeout
from dnipipe.messages import Gradient, Report, Stop
from dnipipe.transport import Side
from tests.worker.bench import Bench, Crew, Script, batches, synthetic, wait

Make = Callable[..., Bench]
LIMIT = r"waited \d+ s for {} from stage {} \(transport\.timeout = 0\.1\); "
LAST = r"last batch here {}, last heard of from it {}$"


def expected(whom: str, stage: int, here: int, there: int) -> str:
    return (LIMIT + LAST).format(whom, stage, here, there)


# -- the limit of a wait: reports are never due here, and so it strikes by itself -----------------------------------


def test_no_batch_from_before(bench: Make) -> None:
    with pytest.raises(WaitTimeout, match="^stage 1 " + expected("a batch", 0, 0, 0)):
        bench(timeout=0.1).worker.run()


def test_no_further_batch_from_before(bench: Make) -> None:
    one = bench(timeout=0.1).next_answers()
    one.previous(*batches(1, 7))
    with pytest.raises(WaitTimeout, match="^stage 1 " + expected("a batch", 0, 7, 7)):
        one.worker.run()


def test_no_answer_from_behind(bench: Make) -> None:
    """The oldest that lacks one is named."""
    one = bench(timeout=0.1, rule=synthetic, window=4)
    one.previous(*batches(1, 6))
    one.wire.late.append(lambda: one.next(Gradient(1, torch.zeros(4, 8)), Gradient(2, torch.zeros(4, 8))))
    with pytest.raises(WaitTimeout, match="^stage 1 " + expected("an answer to batch 3", 2, 6, 2)):
        one.worker.run()


def test_no_last_report_from_behind(bench: Make) -> None:
    one = bench(timeout=0.1, index=0, head=Script([]))
    with pytest.raises(WaitTimeout, match="^stage 0 " + expected("an answer to batch 0", 1, 0, 0)):
        one.worker.run()


@pytest.mark.parametrize(
    ("index", "stopping", "named"),
    [(0, False, "stage 1"), (0, True, "stage 1"), (2, False, "stage 1"), (2, True, "stage 1")],
)
def test_who_is_named_is_there(bench: Make, index: int, stopping: bool, named: str) -> None:
    """Stage 0 has nobody before it, the last stage nobody behind, whatever they wait for."""
    one = bench(index=index)
    one.worker.stopping = stopping
    assert f" from {named} (" in one.worker._whom(20.0)


def test_how_long_it_was_is_told(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """From when the stage had nothing more to do, by a clock that jumps."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    one = bench(timeout=42.0).next_answers()

    def later(seconds: float, then: Callable[[], object]) -> Callable[[], None]:
        def jump() -> None:
            clock.now += seconds
            then()

        return jump

    one.wire.late.append(later(41.0, lambda: one.previous(*batches(1, 1))))  # just in time, and it begins anew
    one.wire.late.append(later(41.0, one.wire.wake))
    one.wire.late.append(later(1.0, one.wire.wake))
    with pytest.raises(WaitTimeout, match=r"^stage 1 waited 42 s for a batch from stage 0 .*last batch here 1"):
        one.worker.run()
    assert not one.wire.late


def test_both_neighbours_are_told(bench: Make) -> None:
    one = bench(timeout=0.1)
    with pytest.raises(WaitTimeout) as raised:
        one.worker.run()
    for side in Side:
        (stop,) = one.heard(side)
        assert isinstance(stop, Stop) and stop.reason == f"stage 1: {raised.value}"


# -- reports -----------------------------------------------------------------------------------------------------


def test_reports_go_out_while_nothing_comes(bench: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLD_EVERY", 0.0)
    one = bench(report_every=0.05).next_answers()
    one.wire.late.extend([lambda: None, lambda: None, lambda: one.previous(*batches(1, 1), Stop(1))])
    one.worker.run()
    reports = [message for message in one.heard(Side.PREVIOUS) if isinstance(message, Report) and message.stage == 1]
    assert [message.final for message in reports[-2:]] == [False, True]
    assert sum(message.batch == 0 for message in reports) >= 2  # one each wait that ended with nothing
    lines = [json.loads(line) for line in (tmp_path / "stage-1.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [message.batch for message in reports[:-1]]


def test_stage_0_is_told_less_often_than_lines_are_written(
    bench: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each report passes through every stage before this one: what stage 0 shows a person does not need more."""
    monkeypatch.setattr(module, "TOLD_EVERY", 3600.0)
    one = bench(report_every=0.05).next_answers()
    one.wire.late.extend([lambda: None, lambda: None, lambda: one.previous(*batches(1, 1), Stop(1))])
    one.worker.run()
    reports = [message for message in one.heard(Side.PREVIOUS) if isinstance(message, Report) and message.stage == 1]
    assert [message.final for message in reports] == [False, False, True]  # the first, at the end, and the last words
    assert len((tmp_path / "stage-1.jsonl").read_text().splitlines()) >= 3


def test_a_stage_whose_starter_is_gone_ends_with_its_next_report(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench(report_every=0.05)
    gone = os.getppid() + 1
    one.wire.late.append(lambda: monkeypatch.setattr(os, "getppid", lambda: gone))
    with pytest.raises(PeerLost, match="stage 1 ends: the process that started it is gone"):
        one.worker.run()


# -- an interrupt ------------------------------------------------------------------------------------------------


def test_the_wish_goes_up_once(bench: Make) -> None:
    """Ctrl-C may be pressed again, and may also have reached the stages behind."""
    one = bench().next_answers()

    def again() -> None:
        one.worker.interrupt()
        one.next(Stop(-1))

    one.wire.late.append(one.worker.interrupt)
    one.wire.late.append(again)
    one.wire.late.append(lambda: one.previous(*batches(1, 1), Stop(1)))
    one.worker.run()
    wishes = [message for message in one.heard(Side.PREVIOUS) if isinstance(message, Stop)]
    assert [(wish.batch, wish.reason) for wish in wishes] == [(-1, "")]
    assert [message.batch for message in one.heard(Side.NEXT) if isinstance(message, Stop)] == [1]


def test_a_stage_that_is_stopping_anyway_wishes_nothing(bench: Make) -> None:
    one = bench()
    one.previous(Stop(0))
    one.wire.late.append(one.worker.interrupt)
    one.wire.late.append(lambda: one.next(Report(2, 0, final=True)))
    one.worker.run()
    assert not any(isinstance(message, Stop) for message in one.heard(Side.PREVIOUS))


def test_an_interrupted_stage_does_not_wait_for_ever(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.1)
    one = bench(timeout=300.0)
    one.wire.late.append(one.worker.interrupt)
    with pytest.raises(WaitTimeout, match=r"^not ended 0\.1 s after it was asked to: stage 1 waited \d+ s for a batch"):
        one.worker.run()


@pytest.mark.parametrize("rule", [wait, synthetic], ids=["wait", "synthetic"])
@pytest.mark.parametrize("where", [0, 2, 3])
def test_an_interrupt_anywhere_ends_all_in_order_with_a_checkpoint(tmp_path: Path, where: int, rule: object) -> None:
    """The script has no end of its own. The wish comes from another thread than the stage's, as a signal would."""
    script = Script(each for first in range(1, 10**6, 100) for each in batches(first, first + 99))
    crew = Crew(tmp_path, script, 4, rule, window=1 if rule is wait else 3)  # type: ignore[arg-type]

    def fifth() -> None:
        if crew.workers[1].stage.last_batch >= 5:
            crew.workers[where].interrupt()

    crew.wires[1].before_receive = fifth
    assert crew.run() == [None] * 4
    assert script.interrupted and script.batch >= 5
    assert all(wire.log.count(f"saved {script.batch}") == 1 for wire in crew.wires)
    assert all(worker.stage.last_batch == script.batch for worker in crew.workers)
    assert sorted(script.finals()) == [0, 1, 2, 3]
