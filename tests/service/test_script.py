"""Stage 0's script when answers are lost: the last evaluation is asked again, but not for ever."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dnipipe.config import build
from dnipipe.data import Task
from dnipipe.display import Display
from dnipipe.errors import WaitTimeout
from dnipipe.messages import Activation, Answer, Evaluation, Message, Stop
from dnipipe.metrics import Clock, StageMetrics
from dnipipe.service.script import RETRY, PatientHead
from dnipipe.service.standin import LOST

SCORE = torch.tensor([6.0, 1.0, 2.0, 2.0], dtype=torch.float64)
LIMIT = 10_000  # messages


class Desk:
    """A head whose evaluations are answered as the test says; the clock goes on while the script waits."""

    def __init__(self, folder: Path, every: int = 0) -> None:
        self.clock = SimpleNamespace(now=1000.0)
        config = build(
            {
                "pipeline": {"stages": 1},
                "eval": {"every": every},
                "train": {"batches": 4},
                "service": {"patience": 30.0},
            }
        )
        pairs = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)) for _ in range(4)]
        task = Task(pairs, pairs[:2], classes=3, corpus="zeros", baseline=None, prompt=None)
        metrics = StageMetrics(0, 1, Clock(lambda: self.clock.now, lambda: self.clock.now))
        display = Display(1, 4, 0, quiet=True, console=Console(file=io.StringIO()))
        self.head = PatientHead(config, task, folder, metrics, display, 0, 4)

    def run(self, answer: Callable[[Evaluation], torch.Tensor], batch: float = 0.0) -> list[Message]:
        """Until Stop; a batch takes that many seconds."""
        given: list[Message] = []
        for _ in range(LIMIT):
            message = self.head.next()
            if message is None:
                self.clock.now += RETRY / 2
                continue
            given.append(message)
            if isinstance(message, Stop):
                return given
            if isinstance(message, Activation):
                self.clock.now += batch
            if isinstance(message, Evaluation):
                self.head.take(Answer(message.batch, answer(message)))
        raise AssertionError("it has no end")


def test_the_last_evaluation_is_asked_until_it_is_answered(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.run(lambda asked: LOST if asked.batch < 9 else SCORE)
    assert desk.head.evaluation == (3.0, 0.5) and desk.head.lost > 1


def test_but_not_for_ever(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with pytest.raises(WaitTimeout, match=r"^stage 0 waited 3\d s for an answer to the last evaluation .* = 30\)"):
        desk.run(lambda asked: LOST)
    assert 1030.0 <= desk.clock.now < 1040.0


def test_who_answers_now_and_then_is_there(tmp_path: Path) -> None:
    """Each time one of the two answers is lost, for much longer than the limit."""
    desk = Desk(tmp_path)
    desk.run(lambda asked: LOST if asked.batch % 2 and desk.clock.now < 1100.0 else SCORE)
    assert desk.clock.now >= 1100.0 and desk.head.evaluation == (3.0, 0.5)


def test_what_was_lost_long_before_the_end_does_not_count(tmp_path: Path) -> None:
    desk = Desk(tmp_path, every=1)
    desk.run(lambda asked: LOST if asked.batch < 9 else SCORE, batch=100.0)
    assert desk.head.evaluation == (3.0, 0.5)
