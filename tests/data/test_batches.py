"""Batches: the seed decides an epoch; a user's own are looked at before they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dnipipe import data
from dnipipe.errors import DataError
from tests.data.conftest import drawn, mnist_config, text_config


def test_the_seed_before_iter_decides_the_epoch(text: Path, digits: Path) -> None:
    for task in (data.load(text_config(text)), data.load(mnist_config(digits))):
        one, same, other = (torch.cat([x for x, _ in drawn(task.train, seed)]) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (torch.zeros(2), "batch 5 is a Tensor: expected a pair"),
        ((torch.zeros(2),), r"a tuple of 1 \(Tensor\)"),
        ([torch.zeros(2), [1, 2]], r"a list of 2 \(Tensor, list\)"),
        ((torch.zeros(2, 3), torch.zeros(3)), r"batch 5: x \(2, 3\) and y \(3,\) differ"),
        ((torch.zeros(()), torch.zeros(())), "differ in their number of samples"),
        ((torch.zeros(0, 3), torch.zeros(0)), r"batch 5 is empty: x \(0, 3\), y \(0,\)"),
        (
            (torch.zeros(3), torch.tensor([0, 9, 10])),
            r"batch 5: label 10 at position \[2\] of y \(3,\) is outside \[0, 10\)",
        ),
        ((torch.zeros(2), torch.tensor([[0, 1], [-1, 2]])), r"label -1 at position \[1, 0\]"),
        ((torch.zeros(2), torch.zeros(2)), "labels are torch.float32, expected whole numbers"),
    ],
)
def test_batches_that_are_refused(pair: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.check_batch(pair, 10, 5)


def test_batches_that_pass() -> None:
    x, y = torch.zeros(2, 3), torch.tensor([0, 9])
    assert data.check_batch([x, y], 10, 1) == (x, y)
    target = torch.randn(2, 1)
    assert data.check_batch((x, target), None, 1)[1] is target  # a regression: no classes, any numbers
