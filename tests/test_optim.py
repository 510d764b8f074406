"""Schedules at exact values, the same on every stage; optimizers with the settings they were asked for.

factor   1 ┤    ____          warm-up of 3 batches, then linear: batch 4 has the whole rate, and of what remains
           │  /      \\__      each batch takes an equal part, so that batch `total` still learns a little
         0 └─┬──┬────────┬►
             1  4      total
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn as nn

from dnipipe import optim
from dnipipe.config import build
from dnipipe.gradient_rules import Wait
from dnipipe.messages import Activation
from tests.conftest import Line, blobs, make_stages


def factors(total: int, **settings: object) -> list[float]:
    """Of batches 1 to `total`."""
    schedule = optim.schedule(build({"optimizer": settings}), total)
    return [schedule(batch) for batch in range(1, total + 1)]


def exactly(*values: str) -> list[float]:
    return [float(Fraction(value)) for value in values]


# -- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("constant", 0, exactly("1", "1", "1", "1", "1")),
        ("constant", 3, exactly("1/4", "2/4", "3/4", "1", "1")),
        ("linear", 0, exactly("1", "4/5", "3/5", "2/5", "1/5")),
        ("linear", 1, exactly("1/2", "1", "3/4", "2/4", "1/4")),
        ("linear", 4, exactly("1/5", "2/5", "3/5", "4/5", "1")),
        ("cosine", 0, [(1 + math.cos(math.pi * done / 5)) / 2 for done in range(5)]),
        ("cosine", 1, [0.5, *((1 + math.cos(math.pi * done / 4)) / 2 for done in range(4))]),
    ],
)
def test_each_batch_of_a_run_of_five(kind: str, warmup: int, expected: list[float]) -> None:
    assert factors(5, schedule=kind, warmup=warmup) == pytest.approx(expected, abs=1e-15)


def test_a_rate_falls_to_a_tenth_behind_each_drop() -> None:
    assert factors(7, schedule="steps", warmup=1, drops=[3, 5]) == pytest.approx([0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_it_only_falls_after_the_warm_up_and_never_stops_learning(kind: str, warmup: int) -> None:
    found = factors(100, schedule=kind, warmup=warmup)
    rise, fall = found[:warmup], found[warmup:]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    assert fall[0] == 1.0 and 0.0 < found[-1] < 0.02


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_behind_its_end_nothing_is_learnt_and_nothing_rises_again(kind: str) -> None:
    schedule = optim.schedule(build({"optimizer": {"schedule": kind}}), 5)
    assert [schedule(batch) for batch in (6, 7, 12)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_run_shorter_than_its_warm_up_only_rises(kind: str) -> None:
    assert factors(2, schedule=kind, warmup=4) == exactly("1/5", "2/5")


class Noting(torch.optim.SGD):
    """Remembers the learning rate of each step."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr)
        self.rates: list[float] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


def test_late_or_not_every_stage_gives_a_batch_the_same_rate() -> None:
    """Stages that wait step on batch 1 when the last stage has long gone on: by the batch's id, not by a count."""
    schedule = optim.schedule(build({"optimizer": {"schedule": "linear", "warmup": 2}}), 6)
    modules: list[nn.Module] = [nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
    stages = make_stages(modules, lambda k: Wait(), partial(Noting, lr=0.5), schedule=schedule, stop=False)
    line = Line(stages, delay=4)
    for batch, (x, y) in enumerate(blobs(6), start=1):
        line.feed(Activation(batch, x * float("nan") if batch == 2 else x, y))  # a batch that no stage steps on
    line.run()
    expected = [0.5 * float(Fraction(value)) for value in ("1/3", "1", "3/4", "2/4", "1/4")]
    for stage in stages:
        assert isinstance(stage.descent.optimizer, Noting)
        assert stage.descent.optimizer.rates == pytest.approx(expected, abs=1e-15)


# -- steps ------------------------------------------------------------------------------------------------------


def descend(batches: dict[int, tuple[float, int]], **settings: object) -> list[tuple[int, float]]:
    """{batch: (gradient, updates late)} to [(batch, how far the one weight went)], from a rate of 1/2."""
    weight = nn.Parameter(torch.tensor(0.0))
    descent = optim.Descent(torch.optim.SGD([weight], lr=0.5), **settings)  # type: ignore[arg-type]
    steps = []
    for batch, (gradient, late) in batches.items():
        weight.grad = torch.tensor(gradient) + (0.0 if weight.grad is None else weight.grad)
        before = weight.item()
        if descent.step(batch, late):
            steps.append((batch, before - weight.item()))
            assert weight.grad is None
    return steps


def test_a_step_every_m_batches_by_their_ids_with_the_mean() -> None:
    gradients = {batch: (float(batch), 0) for batch in range(1, 10)}
    assert descend(gradients) == [(batch, 0.5 * batch) for batch in range(1, 10)]
    assert descend(gradients, accumulate=4) == [(4, 1.25), (8, 3.25)]
    gradients.pop(4)  # skipped: what was gathered waits for the next, and every gradient counts a quarter
    assert descend(gradients, accumulate=4) == [(8, 0.5 * (1 + 2 + 3 + 5 + 6 + 7 + 8) / 4)]
    assert descend(gradients, accumulate=4, clip=0.5, schedule=lambda batch: 1 / batch) == [
        (8, pytest.approx(0.25 / 8, rel=1e-5))
    ]


def test_a_late_step_is_divided_by_its_delay_at_first_and_not_at_last() -> None:
    """τ^-(1 - batch/100), and one update late is τ = 1: the stage is never less late than that in PipeMare."""
    late = {1: (2.0, 0), 2: (2.0, 1), 20: (2.0, 4), 50: (2.0, 4), 75: (2.0, 16), 99: (2.0, 4), 100: (2.0, 4)}
    expected = [1.0, 1.0, 4**-0.8, 0.5, 0.5, 4**-0.01, 1.0]
    assert [far for _, far in descend(late, reschedule=100)] == pytest.approx(expected, rel=1e-5)
    assert [far for _, far in descend(late)] == pytest.approx([1.0] * 7)


# -- optimizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "torchs_own"),
    [
        ("adam", partial(torch.optim.Adam, lr=0.03, weight_decay=0.2, betas=(0.8, 0.999))),
        ("adamw", partial(torch.optim.AdamW, lr=0.03, weight_decay=0.2, betas=(0.8, 0.999))),
        ("nadam", partial(torch.optim.NAdam, lr=0.03, weight_decay=0.2, betas=(0.8, 0.999))),
        ("sgd", partial(torch.optim.SGD, lr=0.03, weight_decay=0.2, momentum=0.9)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_optimizer_is_the_one_that_was_asked_for(
    name: str, torchs_own: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    """Two steps of it are two steps of torch's own with those settings."""
    config = build({"optimizer": {"name": name, "lr": 0.03, "weight_decay": 0.2, "momentum": 0.9, "beta1": 0.8}})
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    made, expected = optim.factory(config)([ours]), torchs_own([theirs])
    assert isinstance(made, type(expected)) and type(made).__name__ == type(expected).__name__
    for _ in range(2):
        for parameter, optimizer in ((ours, made), (theirs, expected)):
            parameter.grad = parameter.detach() ** 2
            optimizer.step()
    assert torch.equal(ours, theirs) and torch.is_grad_enabled()
    assert not torch.equal(ours, torch.tensor([1.0, -2.0, 3.0]))


def test_no_compiler_is_imported_to_step() -> None:
    """Every stage would be up a second later, and 40 MB larger."""
    script = """
import sys
import torch
from dnipipe import optim
from dnipipe.config import build
for name in ("adam", "adamw", "nadam", "sgd"):
    weights = torch.nn.Parameter(torch.ones(3))
    made = optim.factory(build({"optimizer": {"name": name}}))([weights])
    weights.sum().backward()
    made.step()
    made.zero_grad()
    made.load_state_dict(made.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("age", [0, 3])
def test_what_comes_late_joins_with_the_more_weight_the_lower_the_rate_has_fallen(age: int) -> None:
    """It is least at the schedule's height; while that still rises too, for a first batch is no time to hurry."""
    parameter = nn.Parameter(torch.zeros(2))
    factors = [0.0, 0.25, 0.5, 1.0, 1.0, 0.5, 0.0]  # of batches 0 to 6
    taken = []
    for batch in (1, 2, 3, 4, 5, 6):
        descent = optim.Descent(torch.optim.SGD([parameter], lr=0.1), schedule=factors.__getitem__)
        parameter.grad = None
        descent.join([parameter], [torch.tensor([1.0, 2.0])], 0.25, age, batch)
        assert parameter.grad is not None
        taken.append(parameter.grad.clone())
    least = {0: 0.25, 3: 0.125}[age]
    weights = [*[least] * 4, {0: (1 + 0.5 * 15) ** -0.5, 3: (1 + 0.5 * 15 + 0.25 * 48) ** -0.5}[age], 1.0]
    for grad, weight in zip(taken, weights, strict=True):
        torch.testing.assert_close(grad, weight * torch.tensor([1.0, 2.0]))
    descent.join([parameter], [torch.tensor([1.0, 2.0])], 0.25, age, 6)
    torch.testing.assert_close(parameter.grad, torch.tensor([2.0, 4.0]))  # beside what is there already
