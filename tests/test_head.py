"""Stage 0's script under an interrupt: a checkpoint and Stop come next, whatever it was about to do."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from dnipipe.config import build
from dnipipe.data import Task
from dnipipe.display import Display
from dnipipe.errors import DataError
from dnipipe.head import Head
from dnipipe.messages import Activation, Answer, Checkpoint, Evaluation, Stop
from dnipipe.metrics import StageMetrics


def pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)) for _ in range(count)]


def a_head(folder: Path, validation: int = 100) -> Head:
    config = build({"pipeline": {"stages": 1}, "eval": {"every": 2}, "train": {"batches": 5}})
    task = Task(pairs(5), pairs(validation), classes=3, corpus="zeros", baseline=None, prompt=None)
    display = Display(1, 5, 0, quiet=True, console=Console(file=io.StringIO()))
    return Head(config, task, folder, StageMetrics(0, 1), display, 0, 5)


def kinds(messages: Iterable[object]) -> list[str]:
    return [f"{type(message).__name__} {getattr(message, 'batch', '')}" for message in messages]


def test_between_two_batches(tmp_path: Path) -> None:
    head = a_head(tmp_path)
    assert isinstance(head.next(), Activation)
    head.interrupt()
    assert [type(head.next()), type(head.next())] == [Checkpoint, Stop]


def test_in_the_middle_of_an_evaluation(tmp_path: Path) -> None:
    """It may be longer than the time that an interrupted run has; what was answered of it is no score."""
    head = a_head(tmp_path)
    script = iter(head.next, None)
    assert kinds([next(script) for _ in range(4)]) == ["Activation 1", "Activation 2", "Evaluation 1", "Evaluation 2"]
    head.take(Answer(1, torch.tensor([6.0, 1.0, 2.0, 2.0])))
    head.interrupt()
    assert kinds([next(script), next(script)]) == ["Checkpoint 2", "Stop 2"]
    head.take(Answer(2, torch.tensor([6.0, 1.0, 2.0, 2.0])))
    assert head.evaluation is None


def test_validation_data_that_is_at_its_end_is_an_error(tmp_path: Path) -> None:
    """A generator gives its batches once; the second evaluation finds none."""
    head = a_head(tmp_path, validation=1)
    head.task = replace(head.task, validation=iter(pairs(1)))
    assert kinds([head.next() for _ in range(5)])[2:] == ["Evaluation 1", "Activation 3", "Activation 4"]
    with pytest.raises(DataError, match=r"no batch after training batch 4: a generator .* pass a list of batches"):
        head.next()


def test_an_evaluation_that_goes_to_its_end_is_scored_over_all_samples(tmp_path: Path) -> None:
    head = a_head(tmp_path, validation=2)
    asked = [message for message in (head.next() for _ in range(4)) if isinstance(message, Evaluation)]
    for message, answer in zip(asked, ([6.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]), strict=True):
        assert head.evaluation is None
        head.take(Answer(message.batch, torch.tensor(answer, dtype=torch.float64)))
    assert isinstance(head.next(), Activation)
    assert head.evaluation == (7 / 3, 2 / 3)
