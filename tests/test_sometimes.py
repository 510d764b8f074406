"""Updates that are drawn: who updates on which batch, who is told what, and who learns from it.

batch      1   2   3   4   5   6        u: updates        a predictor learns in the columns where the stage behind
stage 0    u   .   u   u   .   .                          it updates, whether or not its own does
stage 1    .   .   u   .   u   u
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.gradient_rules import Blend, Delayed, GradientRule, Local, Skip, Synthetic, Wait
from dnipipe.learner import Learner
from dnipipe.messages import Activation, Checkpoint, Gradient, Saved
from dnipipe.predictors import VFBN
from dnipipe.randomness import chance
from dnipipe.sometimes import Sometimes
from dnipipe.split import plan
from dnipipe.stage import Stage
from dnipipe.state import state_of
from tests.conftest import Line, blobs, make_stages, narrow
from tests.test_laboratory import train
from tests.test_processes import same
from tests.test_stage import SGD, Fixed, equal, layers, one_at_a_time

BATCHES = 40


def drawn(k: int, p: float = 0.5) -> list[bool]:
    """What stage k of `sometimes` draws for batches 1 to BATCHES."""
    return [chance(p, 0, k, "update", batch) for batch in range(1, 1 + BATCHES)]


def sometimes(rule: Callable[[int], GradientRule], p: float = 0.5) -> list[Stage]:
    """Three stages, each drawing for itself, the last too."""
    stages = make_stages(layers(), rule, SGD)
    for k, stage in enumerate(stages):
        stage.rule = Sometimes(stage.rule, p, 0, k)
    return stages


def updates_by_batch(stages: list[Stage], delay: int = 0) -> list[list[bool]]:
    """Whether each stage's weights changed on each batch, one batch in flight."""
    line, found = Line(stages, delay), [[] for _ in stages]  # type: ignore[var-annotated]
    for batch, (x, y) in enumerate(blobs(BATCHES), start=1):
        before = [[p.detach().clone() for p in stage.module.parameters()] for stage in stages]
        line.feed(Activation(batch, x, y))
        line.run()
        for k, stage in enumerate(stages):
            moved = [not torch.equal(p, q) for p, q in zip(stage.module.parameters(), before[k], strict=True)]
            assert any(moved) == (stage.updates > sum(found[k]))
            found[k].append(any(moved))
    return found


# -- the draw ----------------------------------------------------------------------------------------------------


def test_a_draw_is_a_function_of_seed_layer_and_batch_and_leaves_torch_alone() -> None:
    rule = Sometimes(Wait(), 0.5, 3, 7)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [rule.draws(batch) for batch in range(100)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert [Sometimes(Delayed(), 0.5, 3, 7).draws(batch) for batch in reversed(range(100))] == first[::-1]
    for other in (Sometimes(Wait(), 0.5, 4, 7), Sometimes(Wait(), 0.5, 3, 8)):
        assert [other.draws(batch) for batch in range(100)] != first


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_stages_draw_with_probability_p_and_for_themselves(p: float) -> None:
    """Two stages' draws both come true for p² of 10,000 batches, whichever two; five standard deviations."""
    rows = torch.tensor([[chance(p, 0, layer, "update", b) for b in range(10_000)] for layer in range(4)]).double()
    assert (rows.mean(1) - p).abs().max() < 5 * (p * (1 - p) / 10_000) ** 0.5
    both = (rows @ rows.T / 10_000)[~torch.eye(4, dtype=torch.bool)]
    assert (both - p * p).abs().max() < 5 * (p * p * (1 - p * p) / 10_000) ** 0.5


# -- the journey -------------------------------------------------------------------------------------------------


def test_a_stage_updates_on_the_batches_it_drew_and_predictors_learn_where_the_next_one_did() -> None:
    predictors = [Fixed(0.01), Fixed(0.02)]
    stages = sometimes(lambda k: Synthetic(Learner(predictors[k], 1e-3)))
    found = updates_by_batch(stages)
    assert found == [drawn(0), drawn(1), drawn(2)]
    for k in (0, 1):
        assert len(predictors[k].taught) == sum(drawn(k + 1))
    assert all(stage.in_flight == 0 for stage in stages)
    assert [stage.last_batch for stage in stages] == [BATCHES] * 3


def test_a_stage_that_leaves_a_batch_out_passes_it_on_and_answers_at_once_with_nothing() -> None:
    stages = sometimes(lambda k: Synthetic(Learner(Fixed(0.01), 1e-3)))
    out = drawn(1).index(False) + 1
    x, y = next(blobs(1, features=12))
    first, second = stages[1].handle(Activation(out, x, y))
    assert isinstance(first, Activation) and isinstance(second, Gradient) and second.g is None
    assert list(stages[1].handle(Gradient(out, torch.ones(16, 10)))) == []  # it teaches, and is not passed on


def test_what_was_left_out_on_purpose_is_counted_as_that() -> None:
    stages = sometimes(lambda k: Synthetic(Learner(Fixed(0.01), 1e-3)))
    one_at_a_time(Line(stages), BATCHES)
    for k in (0, 1, 2):
        totals, mine, behind = stages[k].metrics.totals(), drawn(k), drawn(min(k + 1, 2))
        unanswered = sum(a and not b for a, b in zip(mine, behind, strict=True))  # it updated, the next one did not
        assert totals["skipped.not drawn"] == BATCHES - sum(mine)
        assert totals.get("skipped.no gradient came", 0) == unanswered
        assert totals["at_once"] == sum(mine) / BATCHES
    assert stages[2].metrics.totals()["loss"] > 0


@pytest.mark.parametrize("rule", [lambda k: Wait(), lambda k: Delayed()], ids=["wait", "delayed"])
def test_without_prediction_a_stage_needs_all_behind_it_to_have_drawn(rule: Callable[[int], GradientRule]) -> None:
    rows = [drawn(k) for k in range(3)]
    assert updates_by_batch(sometimes(rule)) == [
        [all(column) for column in zip(*rows[k:], strict=True)] for k in range(3)
    ]


def test_blend_mends_only_what_it_applied() -> None:
    stages, mended = sometimes(lambda k: Blend(Learner(Fixed(0.01), 1e-3), 1.0)), [0, 0, 0]
    for k, stage in enumerate(stages):

        def counted(*given: Any, k: int = k, again: Callable[..., Tensor] = stage.passes.again) -> Tensor:
            mended[k] += 1
            return again(*given)

        stage.passes.again = counted  # type: ignore[method-assign]
    one_at_a_time(Line(stages), BATCHES)
    rows = [drawn(k) for k in range(3)]
    assert mended == [sum(a and b for a, b in zip(rows[k], rows[k + 1], strict=True)) for k in (0, 1)] + [0]
    assert [stage.updates for stage in stages] == [sum(row) for row in rows]


def test_a_local_head_learns_with_its_stage() -> None:
    head = VFBN(nn.Linear(12, 3), F.cross_entropy, 0.0)
    rule = Sometimes(Local(Learner(head, 1e-2)), 0.5, 0, 0)
    for batch, is_drawn in enumerate(drawn(0), start=1):
        before = [p.detach().clone() for p in head.parameters()]
        use = rule.now(batch, torch.randn(4, 12), torch.tensor([0, 1, 2, 0]))
        assert isinstance(use, Skip) is not is_drawn
        assert all(torch.equal(p, q) for p, q in zip(head.parameters(), before, strict=True)) is not is_drawn


def test_a_warm_up_is_drawn_too() -> None:
    """True gradients then travel only as far up as every stage drew."""
    stages = sometimes(lambda k: Synthetic(Learner(Fixed(9.0), 1e-3), warmup=BATCHES))
    rows = [drawn(k) for k in range(3)]
    assert updates_by_batch(stages) == [[all(column) for column in zip(*rows[k:], strict=True)] for k in range(3)]


def test_one_stage_equals_plain_autograd_that_steps_now_and_then_bitwise() -> None:
    (stage,) = make_stages([nn.Sequential(*layers())], lambda k: Wait(), SGD)
    stage.rule = Sometimes(stage.rule, 0.5, 0, 0)
    one_at_a_time(Line([stage]), BATCHES)
    model = nn.Sequential(*layers())
    optimizer = SGD(model.parameters())
    for (x, y), is_drawn in zip(blobs(BATCHES), drawn(0), strict=True):
        loss = F.cross_entropy(model(x), y)  # batch norm counts it either way: the forward is made
        if is_drawn:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert equal([stage], model)


# -- checkpoints, and from the settings --------------------------------------------------------------------------


def test_a_batch_left_out_is_saved_at_once_not_behind_later_updates() -> None:
    """Its gradient may still be on its way; no update waits for it."""
    stages = sometimes(lambda k: Synthetic(Learner(Fixed(0.01), 1e-3)))
    out = drawn(0).index(False) + 1
    x, y = next(blobs(1))
    list(stages[0].handle(Activation(out, x, y)))
    sent = list(stages[0].handle(Checkpoint(out)))
    assert [type(message) for message in sent] == [Checkpoint, Saved]


def test_the_predictor_of_the_rule_within_is_what_is_saved() -> None:
    modules = layers()
    planned = plan(nn.Sequential(*modules), 3, (1, 2), *next(blobs(1)), 3)
    stages = make_stages(
        modules, lambda k: Synthetic(Learner(VFBN(nn.Linear((12, 10)[k], 3), F.cross_entropy, 0.1), 1e-3)), SGD
    )
    for k, stage in enumerate(stages):
        stage.rule = Sometimes(stage.rule, 0.5, 0, k)
    one_at_a_time(Line(stages), BATCHES)
    for k, stage in enumerate(stages):
        state = state_of(stage, planned)
        assert bool(state.predictor) is (k < 2)
        steps = {int(values["step"]) for values in state.predictor_optimizer.values()}
        lessons = sum(drawn(k)) + sum(drawn(k + 1)) if k < 2 else 0  # at once, and from what arrived
        assert steps == ({lessons} if k < 2 else set())


def test_a_run_repeats_and_says_what_it_left_out(tmp_path: Path) -> None:
    """Cut at batch 20 and continued, too: local learns from nothing that could be under way at the cut."""
    settings = {"rule__name": "local", "rule__p_update": 0.3, "transport__delay": 2}
    told = train(tmp_path / "whole", **settings)
    train(tmp_path / "cut", train__batches=20, **settings)
    train(tmp_path / "cut", "--resume", str(tmp_path / "cut"), **settings)
    assert same(checkpoint.weights(tmp_path / "whole"), checkpoint.weights(tmp_path / "cut"))
    left = [stage["reasons"]["not drawn"] for stage in told["stage"]]
    assert all(25 <= count <= 45 for count in left) and len(set(left)) > 1
    other = train(tmp_path / "all", rule__name="local", transport__delay=2)
    assert all("not drawn" not in stage["reasons"] for stage in other["stage"])
    json.dumps(told)


def test_it_learns_with_three_updates_in_ten() -> None:
    """Three stages on blobs, and where no stage but the last one updates for comparison."""

    def loss(p: float, warmup: int) -> float:
        modules, learners = narrow()
        stages = make_stages(
            modules,
            lambda k: Synthetic(learners[k], 0.0, warmup, "zero"),
            partial(torch.optim.Adam, lr=5e-3),
        )
        for k, stage in enumerate(stages):
            stage.rule = Sometimes(stage.rule, p, 0, k)
        one_at_a_time(Line(stages), 600)
        x, y = list(blobs(601))[-1]
        with torch.no_grad():
            return F.cross_entropy(nn.Sequential(*modules).eval()(x), y).item()

    assert loss(0.3, warmup=0) < 0.8 * loss(0.3, warmup=10**6)
