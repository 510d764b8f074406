"""A stage that fails tells both neighbours, these theirs, and all of them say the first cause, as it was.

stage 0 ◄── stage 1 ◄── stage 2 ──► stage 3 ──► stage 4
PeerStopped   "        RuntimeError   "      PeerStopped("stage 2: RuntimeError: boom")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dnipipe.errors import MessageError, PeerLost, PeerStopped, RunError
from dnipipe.messages import Checkpoint, Gradient, Message, Stop
from dnipipe.transport import Side
from tests.worker.bench import Bench, Crew, Script, batches, synthetic, wait

Make = Callable[..., Bench]


def reasons(bench: Bench, side: Side) -> list[str]:
    """With which the neighbour on that side was stopped."""
    return [message.reason for message in bench.heard(side) if isinstance(message, Stop) and message.reason]


@pytest.mark.parametrize("rule", [wait, synthetic], ids=["wait", "synthetic"])
@pytest.mark.parametrize("where", [0, 2, 4])
def test_all_stages_end_with_the_first_cause(tmp_path: Path, where: int, rule: object) -> None:
    boom = RuntimeError("boom")
    crew = Crew(tmp_path, Script(batches(1, 400)), 5, rule, window=1 if rule is wait else 4)  # type: ignore[arg-type]
    stage = crew.workers[where].stage

    def fails(module: torch.nn.Module, inputs: object) -> None:
        if stage.last_batch == 5:
            raise boom

    stage.module.register_forward_pre_hook(fails)
    ends = crew.run()
    assert ends[where] is boom
    others = ends[:where] + ends[where + 1 :]
    assert [(type(end), str(end)) for end in others] == [(PeerStopped, f"stage {where}: RuntimeError: boom")] * 4


@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
def test_a_reason_is_passed_on_as_it_came(bench: Make, side: Side) -> None:
    one = bench()
    (one.previous if side is Side.PREVIOUS else one.next)(Stop(3, "stage 7: it is nan"))
    with pytest.raises(PeerStopped, match=r"^stage 7: it is nan$"):
        one.worker.run()
    assert [reasons(one, each) for each in Side] == [["stage 7: it is nan"]] * 2


@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.value)
def test_a_neighbour_that_goes_without_a_word_is_named(bench: Make, side: Side) -> None:
    one = bench()
    gone, other = (0, Side.NEXT) if side is Side.PREVIOUS else (2, Side.PREVIOUS)
    one.wire.late.append(one.ends[gone].close)
    expected = f"stage {gone}, the {side.value} of stage 1, has closed"
    with pytest.raises(PeerLost, match=f"^{expected}$"):
        one.worker.run()
    assert reasons(one, other) == [f"stage 1: {expected}"]


def test_a_neighbour_whose_end_is_noticed_before_its_reason_is_still_heard(bench: Make) -> None:
    """This stage is at work on a batch when the next one fails and closes; then it sends, and there is nobody."""
    one = bench()
    one.previous(*batches(1, 1))

    def fails(side: Side, message: Message) -> None:
        if side is Side.NEXT and not isinstance(message, Stop):
            one.next(Gradient(0, None), Stop(0, "stage 2: the loss is nan"))
            one.ends[2].close()

    one.wire.before_send = fails
    with pytest.raises(PeerStopped, match=r"^stage 2: the loss is nan$") as raised:
        one.worker.run()
    assert isinstance(raised.value.__cause__, PeerLost)
    assert reasons(one, Side.PREVIOUS) == ["stage 2: the loss is nan"]


def test_a_stage_that_fails_behind_stop_still_tells_the_stage_before(bench: Make) -> None:
    """Nothing more comes from there, but it waits for gradients and last reports."""
    one = bench(window=2)
    one.previous(*batches(1, 1), Stop(1))
    one.wire.late.append(lambda: one.next(Gradient(1, torch.zeros(4, 5))))  # of a wrong shape
    with pytest.raises(MessageError, match="did not ask for this gradient of batch 1") as raised:
        one.worker.run()
    assert one.worker.stopping
    assert reasons(one, Side.PREVIOUS) == reasons(one, Side.NEXT) == [f"stage 1: {raised.value}"]


def test_a_checkpoint_that_cannot_be_saved_names_its_batch(bench: Make) -> None:
    def save(batch: int) -> None:
        raise OSError(28, "No space left on device", "/runs/a")

    one = bench(save=save).next_answers()
    one.previous(*batches(1, 3), Checkpoint(3), Stop(3))
    with pytest.raises(RunError, match=r"^cannot save the checkpoint of batch 3: .*No space left.*/runs/a") as raised:
        one.worker.run()
    assert isinstance(raised.value.__cause__, OSError)
    assert reasons(one, Side.PREVIOUS) == [f"stage 1: {raised.value}"]
    assert one.log("to previous: Saved") == []


def test_another_stages_checkpoint_is_not_saved_again(bench: Make) -> None:
    """What comes up from behind is only passed on."""
    one = bench().next_answers()
    one.previous(*batches(1, 1), Checkpoint(1), Stop(1))
    one.worker.run()
    assert one.wire.log.count("saved 1") == 1
    assert sorted(one.log("to previous: Saved ")) == ["1 of 1", "1 of 2"]
