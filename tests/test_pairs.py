"""Layers that give a pair, (h, along): only h learns, and what goes along reaches every layer that needs it.

tokens ──► Embed ──h, padding──► Block ──h, padding──► Block ──h, padding──► Mean ──► logits
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dnipipe
from dnipipe.data import check_batch
from dnipipe.errors import DataError
from dnipipe.pairs import first, joined, parted
from dnipipe.split import Plan, plan

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, TOKENS, WORDS, WIDTH, CLASSES = 8, 6, 12, 8, 3
Pair = tuple[Tensor, Tensor]


class Embed(nn.Module):
    """The padding is what the data say, where x is a pair itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, x: Tensor | Pair) -> Pair:
        tokens, padding = x if isinstance(x, tuple) else (x, x == 0)
        return self.table(tokens), padding


class Block(nn.Module):
    """Attention to what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.go = nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: Pair) -> Pair:
        h, padding = pair
        h = h + self.attend(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        return h + torch.tanh(self.go(h)), padding


class Mean(nn.Module):
    """Over what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, pair: Pair) -> Tensor:
        h, padding = pair
        counts = (~padding).unsqueeze(-1).to(h.dtype)
        logits: Tensor = self.out((h * counts).sum(1) / counts.sum(1))
        return logits


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Embed(), Block(), Block(), Mean())


def batch(seed: int) -> Pair:
    """Texts of different lengths; the class is the first word's."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randint(1, WORDS, (SAMPLES, TOKENS), generator=drawn)
    x[torch.arange(TOKENS) >= torch.randint(1, TOKENS + 1, (SAMPLES, 1), generator=drawn)] = 0
    return x, x[:, 0] % CLASSES


BATCHES = [batch(seed) for seed in range(12)]
X = BATCHES[0][0]


def a_run(folder: Path, rule: Any, stages: list[int], **settings: Any) -> dnipipe.Run:
    settings = {"transport": {"kind": "local", "delay": 2}, "output": {"run": str(folder), "quiet": True}, **settings}
    optimizer = {"optimizer": lambda p: torch.optim.SGD(p, 0.1)}
    return dnipipe.Run(model(), stages, loss=F.cross_entropy, rule=rule, **optimizer, **settings)


def test_a_pair_is_taken_apart_and_put_together() -> None:
    h, along = torch.ones(2, 3), torch.zeros(2, dtype=torch.bool)
    assert parted(h) == (h, None) and parted((h, along)) == (h, along)
    assert joined(h, None) is h and joined(h, along) == (h, along)
    doubled = first(lambda x: 2 * x, (h, along))
    assert torch.equal(doubled[0], 2 * h) and doubled[1] is along and torch.equal(first(torch.neg, h), -h)


def test_a_plan_knows_what_goes_along_each_edge() -> None:
    made = plan(model(), 3, (1, 2), *BATCHES[0], CLASSES)
    assert made.along(0) == made.along(1) == ("bool", (SAMPLES, TOKENS)) and made.along(2) is None
    assert made.input(0) == (("int64", (SAMPLES, TOKENS)), None)
    assert made.input(1) == (("float32", (SAMPLES, TOKENS, WIDTH)), ("bool", (SAMPLES, TOKENS)))
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("paired", [False, True], ids=["the first layer's", "the data's"])
@pytest.mark.parametrize("stages", [[1], [2, 3], [1, 2, 3]], ids=str)
def test_waiting_is_plain_autograd(stages: list[int], paired: bool, tmp_path: Path) -> None:
    """Bitwise. A stage that got no padding, or another batch's, would learn something else."""
    run = a_run(tmp_path / "run", "wait", stages)
    run.fit([((x, x == 0) if paired else x, y) for x, y in BATCHES])
    alone = model()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    for x, y in BATCHES:
        F.cross_entropy(alone(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(run.model().parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("blend", {}),  # a graph that waits, on weights that were kept
        ({"name": "blend", "stash": False}, {}),  # a second forward
        ("blend", {"wire": {"activations": "int8", "gradients": "int8"}}),
        ("synthetic", {"predictor": {"name": "mlp"}}),
        ("local", {"pipeline": {"autocast": "bfloat16"}}),
        ("local", {"pipeline": {"autocast": "float16"}}),
    ],
)
def test_every_rule_trains_and_evaluates_with_it(rule: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """What the stages say of held-out data is what the whole model says of it, in one process."""
    run = a_run(tmp_path / "run", rule, [1, 2, 3], **settings)
    said = run.fit(BATCHES, BATCHES[:4], epochs=3)
    whole = run.model().eval()
    with torch.no_grad():
        alone = sum(F.cross_entropy(whole(x), y).item() for x, y in BATCHES[:4]) / 4
    off = 2e-2 if "pipeline" in settings else 1e-5
    assert said["eval"]["loss"] == pytest.approx(alone, abs=off) and alone < 1.09  # log 3 is 1.10


def test_the_example_has_batches_of_its_own_lengths(tmp_path: Path) -> None:
    """examples/padded.py, in the laboratory, for two batches."""
    example = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "padded.py"), run_name="example"))
    lines = example.lines()
    batches = [example.padded(lines[:16]), example.padded(lines[-8:])]
    assert batches[0][0].shape[0] != batches[1][0].shape[0] and set(batches[1][1].tolist()) == {2}
    model = nn.Sequential(example.Embed(), example.Block(), example.Classify())
    here = {"transport": {"kind": "local"}, "output": {"run": str(tmp_path / "run"), "quiet": True}}
    run = dnipipe.Run(model, [1, 2], loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1), **here)
    assert run.fit(batches, batches[1:])["batch"] == 2


def test_the_plan_is_held_against_data_with_pairs_too() -> None:
    x, y = BATCHES[0]
    made = plan(model(), 2, (1,), (x, x == 0), y, CLASSES)
    assert made.input(0) == (("int64", (SAMPLES, TOKENS)), ("bool", (SAMPLES, TOKENS)))
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("x", "says"),
    [
        ((X, X, X), r"batch 7: x is a tuple of 3 \(Tensor, Tensor, Tensor\): expected a tensor, or a pair"),
        ((X, X[:3]), "a pair of them with the batch's samples first"),
        ([X, X.float().requires_grad_()], "of which the second needs no gradient"),
        ("text", "batch 7: x is a str"),
    ],
)
def test_data_that_are_no_pair_are_refused(x: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_batch((x, BATCHES[0][1]), CLASSES, 7)


def test_a_loader_may_make_a_list_of_what_were_pairs() -> None:
    given, _ = check_batch(([X, X == 0], BATCHES[0][1]), CLASSES, 1)
    assert isinstance(given, tuple) and given[0] is X


@pytest.mark.parametrize("paired", [False, True])
def test_an_input_that_is_guessed_cannot_be_a_pair(
    paired: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlocked = {"name": "local", "forward_unlock": True}
    run = a_run(tmp_path / "run", unlocked, [2], transport={"kind": "local"})
    with pytest.raises(SystemExit):
        run.fit([((x, x == 0) if paired else x, y) for x, y in BATCHES])
    assert "rule.forward_unlock = true: a guess is of one tensor, and the data, or a layer," in capsys.readouterr().err
