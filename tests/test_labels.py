"""Which labels count, alone and in whole runs: one that the loss ignores counts in no mean, in no guess.

y:   0   1  -100   2          N = 3, accuracy over three, a mean over three
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dnipipe
from dnipipe import data
from dnipipe.errors import DataError
from dnipipe.heads import Similarity
from dnipipe.labels import IGNORED, class_axis, counting, loss_terms, one_hot, outside
from dnipipe.models import cross_entropy
from dnipipe.predictors import Edge, Labels

# -- alone ---------------------------------------------------------------------------------------------------------


def test_torch_ignores_the_same() -> None:
    h, y = torch.randn(4, 3), torch.tensor([0, 1, IGNORED, 2])
    torch.testing.assert_close(F.cross_entropy(h, y), F.cross_entropy(h[y != IGNORED], y[y != IGNORED]))


@pytest.mark.parametrize(
    ("y", "counts", "terms"),
    [
        (torch.tensor([0, 1, IGNORED, 2]), 3, 3),
        (torch.tensor([[0, IGNORED], [IGNORED, 2]]), 2, 2),
        (torch.tensor([IGNORED, IGNORED]), 0, 1),  # not to divide by none
        (torch.tensor([156, 0], dtype=torch.uint8), 2, 2),  # whose bits as int8 are -100
        (torch.tensor([3, 0], dtype=torch.uint16), 2, 2),
        (torch.tensor([True, False]), 2, 2),
        (torch.full((4, 3), float(IGNORED)), 12, 4),  # a regression: a term a sample, any numbers
    ],
)
def test_what_counts_is_counted(y: Tensor, counts: int, terms: int) -> None:
    assert int(counting(y).sum()) == counts
    assert int(loss_terms(y)) == terms


def test_what_is_no_class_and_not_ignored_is_outside() -> None:
    y = torch.tensor([0, 2, 3, -1, IGNORED])
    assert outside(y, 3).tolist() == [False, False, True, True, False]


def test_an_ignored_label_is_a_row_of_zeros() -> None:
    y = torch.tensor([[2, IGNORED]])
    assert one_hot(y, 3).tolist() == [[[0, 0, 1], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("output", "y", "axis"),
    [
        ((8, 10), (8,), 1),
        ((8, 6, 10), (8, 6), 2),  # tokens
        ((8, 10, 6, 6), (8, 6, 6), 1),  # as F.cross_entropy takes them
        ((8, 1), (8,), None),  # one score
        ((8, 1), (8, 1), None),
        ((8, 5), (8, 5), None),  # several labels a sample
        ((8, 3, 4, 4), (8, 3, 4, 4), None),  # bytes of an image
        ((8, 10), (4,), None),
    ],
)
def test_which_axis_scores_classes(output: tuple[int, ...], y: tuple[int, ...], axis: int | None) -> None:
    assert class_axis(output, y) == axis


@pytest.mark.parametrize(("h", "y"), [((2, 4), (2,)), ((2, 4, 3, 3), (2,)), ((2, 5, 4), (2, 5))])
def test_a_conditioned_predictor_sees_nothing_of_an_ignored_label(h: tuple[int, ...], y: tuple[int, ...]) -> None:
    labels = Labels(Edge(h, y, (2, 3), 3))
    given = torch.ones(y, dtype=torch.int64)
    given[-1] = IGNORED
    features = labels(torch.randn(h), given).movedim(1 if len(h) == 4 else -1, -1)[..., 4:]
    assert features[0].any() and not features[-1].any()


def test_similarity_leaves_ignored_rows_out() -> None:
    torch.manual_seed(0)
    loss, h, y = Similarity(4, 3), torch.randn(6, 4), torch.tensor([0, 1, IGNORED, 2, 0, IGNORED])
    counts = y != IGNORED
    torch.testing.assert_close(loss(h, y), loss(h[counts], y[counts]))


def test_a_batch_of_which_nothing_counts_is_refused() -> None:
    x = torch.zeros(2, 3)
    assert data.check_batch((x, torch.tensor([0, IGNORED])), 3, 1)
    with pytest.raises(DataError, match=r"batch 7: every label is -100, which the loss ignores: leave such a batch"):
        data.check_batch((x, torch.tensor([IGNORED, IGNORED])), 3, 7)
    with pytest.raises(DataError, match=r"label -1 at position \[1\] .* ignore is -100"):
        data.check_batch((x, torch.tensor([0, -1])), 3, 1)


# -- whole runs ----------------------------------------------------------------------------------------------------

LENGTH, CLASSES = 6, 5


class Tokens(nn.Module):
    """A block in which what stands at an ignored place matters to the others."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.net = nn.Linear(LENGTH, LENGTH), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.net(self.mix(h.transpose(1, 2)).transpose(1, 2)))


def padded(batches: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Each sample of another length, the rest of its labels ignored; so each batch counts another number of them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        x = torch.randint(CLASSES, (8, LENGTH), generator=generator)
        y = (x + 1) % CLASSES
        lengths = torch.randint(1, LENGTH + 1, (8, 1), generator=generator)
        found.append((x, torch.where(torch.arange(LENGTH) < lengths, y, IGNORED)))
    return found


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(CLASSES, 8), Tokens(), Tokens(), nn.Linear(8, CLASSES))


def a_run(folder: Path, rule: str, **settings: Any) -> dnipipe.Run:
    return dnipipe.Run(
        net(),
        stages=[1, 2],
        loss=cross_entropy,
        optimizer=lambda p: torch.optim.SGD(p, 0.3),
        rule=rule,
        transport={"kind": "local", "delay": 1},
        output={"quiet": True, "run": str(folder)},
        **settings,
    )


def test_padded_batches_learn_and_score_as_in_plain_torch(tmp_path: Path) -> None:
    """The held-out mean is over labels, not over batches' means."""
    train, held = padded(6, 1), padded(3, 2)
    told = a_run(tmp_path / "run", "wait").fit(train, held)
    alone = net()
    optimizer = torch.optim.SGD(alone.parameters(), 0.3)
    for x, y in train:
        optimizer.zero_grad()
        cross_entropy(alone(x), y).backward()
        optimizer.step()
    h, y = torch.cat([alone(x) for x, _ in held]), torch.cat([y for _, y in held])
    assert told["eval"]["loss"] == pytest.approx(cross_entropy(h, y).item(), rel=1e-4)
    assert told["eval"]["accuracy"] == pytest.approx((h.argmax(-1) == y)[y != IGNORED].float().mean().item())


@pytest.mark.parametrize(
    ("rule", "predictor"),
    [
        ("blend", {}),
        ("synthetic", {"hidden": 1}),
        ("synthetic", {"rows": 0.25}),
        ("synthetic", {"sampled": 2}),
        ("synthetic", {"name": "linear"}),
        ("local", {"similarity": 0.5}),
    ],
)
def test_each_way_to_guess_learns_from_padded_batches(rule: str, predictor: dict[str, Any], tmp_path: Path) -> None:
    train, held = padded(12, 1), padded(3, 2)
    told = a_run(tmp_path / "run", rule, predictor=predictor, train={"epochs": 6}).fit(train, held)
    assert told["eval"]["accuracy"] > 0.5  # a guess without learning: 0.2
