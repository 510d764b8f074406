"""Ahead of the weights: where a batch goes through a stage if its gradient will be late.

θ ──last update──► θ' · · β · · β² · · ►  lean: here the forward and its backward;  stand: back at θ', bitwise, and step
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.gradient_rules import Blend, Delayed, GradientRule
from dnipipe.learner import Learner
from dnipipe.messages import Activation
from dnipipe.optim import Descent
from dnipipe.stage import Stage
from tests.conftest import Line, blobs, make_stages
from tests.test_stage import Fixed, layers

MOMENTUM = {
    "adam": partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.999)),
    "nadam": partial(torch.optim.NAdam, lr=0.01, betas=(0.8, 0.999)),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.8),
}


@pytest.mark.parametrize("name", MOMENTUM)
def test_it_leans_by_what_the_momentum_will_still_do_and_stands_again_bitwise(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    descent = Descent(MOMENTUM[name](net.parameters()), lookahead=3)
    x = torch.randn(5, 3)

    def step(batch: int) -> None:
        net(x).square().sum().backward()
        descent.step(batch)

    weights = net.weight.detach().clone()
    descent.lean(3)
    assert torch.equal(net.weight, weights)  # nothing is known yet
    step(1)
    before = net.weight.detach().clone()
    step(2)
    after = net.weight.detach().clone()
    for late, part in ((0, 0.0), (1, 0.8), (2, 0.8 + 0.64), (3, 0.8 + 0.64 + 0.512), (9, 0.8 + 0.64 + 0.512)):
        descent.lean(late)
        torch.testing.assert_close(net.weight.detach(), after + part * (after - before))
        descent.stand()
        assert torch.equal(net.weight, after)
    descent.lean(2)
    step(3)  # from where it stands, whatever it leant to
    assert (net.weight - after).norm() < 2 * (after - before).norm()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, partial(torch.optim.Adam, betas=(0.0, 0.999))])
def test_without_momentum_there_is_nothing_to_look_ahead_by(kind: Callable[..., torch.optim.Optimizer]) -> None:
    """Also of a user's own optimizer, which no setting tells of: it learns as without, and keeps no copies."""
    net = nn.Linear(2, 2)
    descent = Descent(kind(net.parameters(), lr=0.1), lookahead=3)
    net(torch.ones(1, 2)).sum().backward()
    descent.step(1)
    weights = net.weight.detach().clone()
    descent.lean(2)
    assert torch.equal(net.weight, weights) and descent.lookahead == 0


def last_of(late: int, lookahead: int, curvature: float) -> float:
    """|θ| after 60 updates on θ²/2·curvature from 1, each gradient taken `late` updates ago, at where it leant then."""
    theta = nn.Parameter(torch.ones(()))
    descent = Descent(torch.optim.SGD([theta], lr=0.1, momentum=0.9), lookahead=lookahead)
    waiting: deque[Tensor] = deque()
    for batch in range(1, 61):
        descent.lean(late)
        waiting.append(curvature * theta.detach().clone())
        descent.stand()
        if len(waiting) > late:
            theta.grad = waiting.popleft()
            descent.step(batch)
    return abs(theta.item())


def test_late_gradients_and_momentum_swing_up_where_ahead_of_the_weights_they_do_not() -> None:
    """One update late, z² - 1.9 z + 0.9 + rate · curvature has roots outside the unit circle above a curvature of 1."""
    assert last_of(late=0, lookahead=0, curvature=2.0) < 0.1
    assert last_of(late=1, lookahead=0, curvature=2.0) > 5
    assert last_of(late=1, lookahead=1, curvature=2.0) < 0.1
    assert last_of(late=8, lookahead=0, curvature=0.2) > 1
    assert last_of(late=8, lookahead=8, curvature=0.2) < 0.1


def last_of_blend(late: int, lookahead: int, known: float, curvature: float) -> float:
    """The same where a part of each gradient is `known` at once, and half of the rest joins when it is so late."""
    theta = nn.Parameter(torch.ones(()))
    descent = Descent(torch.optim.SGD([theta], lr=0.1, momentum=0.9), lookahead=lookahead)
    waiting: deque[Tensor] = deque()
    for batch in range(1, 121):
        descent.lean(late)
        gradient = curvature * theta.detach().clone()
        descent.stand()
        waiting.append((1 - known) * gradient)
        theta.grad = known * gradient
        if len(waiting) > late:
            descent.join([theta], [waiting.popleft()], 0.5, late, batch)
        descent.step(batch)
        if abs(theta.item()) > 1e6:  # and on to infinity
            break
    return abs(theta.item())


def test_what_is_known_at_once_bears_to_be_seen_one_update_ahead_not_ten() -> None:
    """So `blend` begins with a lookahead of 1: at one curvature 0 fails where gradients are soon, 10 where late."""
    soon = partial(last_of_blend, 1, known=0.5, curvature=10.0)
    late = partial(last_of_blend, 43, known=0.8, curvature=10.0)
    assert soon(0) > 5 and late(0) < 0.1
    assert soon(1) < 0.1 and late(1) < 0.1
    assert late(10) > 5


@pytest.mark.parametrize("rule", [lambda k: Blend(Learner(Fixed(0.01), 1e-3), 1.0, bp_lambda=1.0), lambda k: Delayed()])
def test_a_stage_sends_what_its_expected_weights_make_and_keeps_its_own(rule: GradientRule) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    stages = make_stages(layers(), rule, partial(torch.optim.Adam, lr=0.01), lookahead=5)  # type: ignore[arg-type]

    def watch(stage: Stage) -> None:
        lean = stage.descent.lean

        def leant(late: int) -> None:
            weights = next(stage.module.parameters())
            before = weights.detach().clone()
            lean(late)
            seen.append((before, weights.detach().clone()))

        stage.descent.lean = leant  # type: ignore[method-assign]

    watch(stages[0])
    line = Line(stages, delay=2)
    line.feed(*(Activation(batch, x, y) for batch, (x, y) in enumerate(blobs(12), start=1)))
    line.run()
    assert [torch.equal(*pair) for pair in seen][:2] == [True, True]  # no gradient has come yet, so none was late
    assert not any(torch.equal(*pair) for pair in seen[-3:])
    standing = next(stages[0].module.parameters()).detach().clone()
    stages[0].descent.stand()
    assert torch.equal(next(stages[0].module.parameters()), standing)  # it stands behind every batch
    assert all(stage.descent._upright == [] for stage in stages)
    assert stages[-1].late == 0  # the last stage's gradient is never late
