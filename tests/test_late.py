"""Gradients that come when the stage has long gone on, and updates that several batches make together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.gradient_rules import Blend, Delayed, GradientRule, Local, Synthetic, Wait
from dnipipe.learner import Learner
from dnipipe.messages import Activation, Gradient
from dnipipe.predictors import VFBN
from dnipipe.split import Plan, part, plan
from dnipipe.stage import Stage
from dnipipe.stash import Graphs
from dnipipe.state import boundary_of, load_state, state_of
from tests.conftest import Line, blobs, make_stages
from tests.test_stage import SGD, Fixed, equal, layers, one_at_a_time, plain

# -- late gradients ----------------------------------------------------------------------------------------------


def two() -> list[nn.Module]:
    first, second, third = layers()
    return [first, nn.Sequential(second, third)]


def fed(stages: list[Stage], batches: int, delay: int) -> list[Stage]:
    """As fast as they go: each stage takes one batch a round, and a gradient comes `delay` rounds late."""
    line = Line(stages, delay)
    line.feed(*(Activation(batch, x, y) for batch, (x, y) in enumerate(blobs(batches), start=1)))
    line.run()
    return stages


def by_hand(delay: int, batches: int, joins: bool = False) -> nn.Module:
    """Two stages: the lower's forward runs at once for the upper, and again when the gradient is to be applied.

    joins: the gradient is applied in the step behind the next forward; the older, the less of it.
    """
    lower, upper = two()
    optimizers = [SGD(lower.parameters()), SGD(upper.parameters())]
    late: list[tuple[int, Tensor, Tensor]] = []
    asked = 0
    for x, y in [*blobs(batches), *[(None, None)] * delay]:
        if x is not None:
            h = lower(x).detach().requires_grad_()
            if joins:
                optimizers[0].step()
                optimizers[0].zero_grad()
            F.cross_entropy(upper(h), y).backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
            asked += 1
            late.append((asked, x, h.grad))
        if x is None or len(late) > delay:
            number, x, g = late.pop(0)
            statistics = [buffer.clone() for buffer in lower.buffers()]
            lower(x).backward(g * (1 + asked - number) ** -0.5 if joins else g)
            for buffer, before in zip(lower.buffers(), statistics, strict=True):
                buffer.copy_(before)
            if not joins:
                optimizers[0].step()
                optimizers[0].zero_grad()
    return nn.Sequential(lower, upper)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_delayed_updates_with_the_gradient_of_a_batch_long_past(delay: int) -> None:
    """Batch b's comes when the `delay` batches between have updated the stage; fewer at the start."""
    stages = fed(make_stages(two(), lambda k: Delayed(), SGD), 10, delay)
    assert equal(stages, by_hand(delay, 10))
    assert equal(stages, plain(two(), 10)) is (delay == 0)
    assert [stage.updates for stage in stages] == [10, 10]
    assert stages[0].metrics.totals()["staleness"] == sum(min(delay, b) for b in range(10)) / 10


@pytest.mark.parametrize("delay", [0, 3])
def test_blend_with_a_guess_of_nothing_takes_the_gradient_into_the_next_update(delay: int) -> None:
    """Plain SGD: the guess moves nothing, so all that moves is what came; and a batch still makes one update."""
    stages = fed(make_stages(two(), lambda k: Blend(Learner(Fixed(0.0), 1e-3), 1.0), SGD), 10, delay)
    assert equal(stages, by_hand(delay, 10, joins=True))
    assert not equal(stages, by_hand(delay, 10))
    assert [stage.updates for stage in stages] == [10, 10]


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_blend_with_true_gradients_mends_all_that_the_guess_has_missed(weight: float) -> None:
    """λ = 1, weights that stay: what was applied at once, and what then waits for the next update, are the gradient."""
    modules = layers()
    x, y = next(blobs(1))
    F.cross_entropy(nn.Sequential(*(twin := copy.deepcopy(modules)))(x), y).backward()
    applied: list[list[Tensor]] = [[], []]
    guesses = [Learner(Fixed(value), 1e-3) for value in (0.01, -0.02)]
    still = partial(torch.optim.SGD, lr=0.0)
    stages = make_stages(modules, lambda k: Blend(guesses[k], weight, bp_lambda=1.0), still)
    for k in (0, 1):
        stages[k].descent.optimizer.register_step_pre_hook(
            lambda *_, k=k: applied[k].extend(p.grad.clone() for p in stages[k].module.parameters())
        )
    line = Line(stages)
    line.feed(Activation(1, x, y))
    line.run()
    for k in (0, 1):
        for p, at_once, true in zip(modules[k].parameters(), applied[k], twin[k].parameters(), strict=True):
            assert p.grad is not None and true.grad is not None
            assert not torch.allclose(at_once, true.grad, rtol=1e-3)
            torch.testing.assert_close(at_once + p.grad / weight, true.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stash", [False, True])
def test_blend_mends_at_the_weights_of_now_or_with_a_stash_of_then(stash: bool) -> None:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    modules = [nn.Linear(8, 4), middle, nn.Linear(5, 3)]
    stages = make_stages(modules, lambda k: Blend(Learner(Fixed(0.5), 1e-3), 0.8, 0.25, stash=stash), SGD)
    x, g, y = torch.randn(6, 4), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    then = copy.deepcopy(middle)
    list(stages[1].handle(Activation(1, x, y)))
    list(stages[1].handle(Activation(2, torch.randn(6, 4), y)))
    at = then if stash else copy.deepcopy(middle)
    assert not torch.allclose(middle[0].weight, then[0].weight)
    (sent,) = stages[1].handle(Gradient(1, g))

    x = x.requires_grad_()
    (guessed,) = torch.autograd.grad(then(x), x, torch.full_like(g, 0.5))  # of ĝ, when it was applied
    (back,) = torch.autograd.grad(at(x), x, g - 0.5)
    missed = torch.autograd.grad(at(x), list(at.parameters()), g - 0.5)
    assert isinstance(sent, Gradient)
    torch.testing.assert_close(sent.g, guessed + 0.25 * back)
    for p, d in zip(middle.parameters(), missed, strict=True):
        torch.testing.assert_close(p.grad, 0.8 * 2**-0.5 * d)  # one batch has come since


class Counted(nn.Sequential):
    """Layers that count their forwards; one has statistics, one is random."""

    def __init__(self, features: int) -> None:
        super().__init__(nn.Linear(features, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2))
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        h: Tensor = super().forward(x)
        return h


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize(
    "rule",
    [
        lambda: Delayed(stash=0.0),
        lambda: Delayed(stash=0.5),
        lambda: Blend(Learner(Fixed(0.5), 1e-3), 0.8, bp_lambda=1.0, stash=True),
        lambda: Blend(Learner(Fixed(0.5), 1e-3), 0.8, bp_lambda=0.3, warmup=4, stash=True),
    ],
)
def test_a_kept_graph_gives_what_a_second_forward_would(rule: Callable[[], GradientRule], delay: int) -> None:
    """No room, room for a part of the batches, and for all: the same weights and statistics, but fewer forwards."""
    made, forwards = [], []
    for room in (0, 6000, 1 << 20):
        torch.manual_seed(0)
        modules: list[nn.Module] = [Counted(8), Counted(6), nn.Linear(6, 3)]
        stages = make_stages(modules, lambda k: rule(), partial(torch.optim.Adam, lr=0.01), lookahead=2)
        for stage in stages:
            stage.passes.graphs = Graphs(room)
        fed(stages, 10, delay)
        assert [stage.passes.graphs.taken for stage in stages] == [0, 0, 0]
        made.append(
            {name: t for stage in stages for name, t in stage.module.state_dict(prefix=f"{stage.index}.").items()}
        )
        forwards.append(modules[0].forwards)
    for other in made[1:]:
        for name, tensor in made[0].items():
            assert torch.equal(tensor, other[name]), name
    assert forwards[0] == 20 and forwards[2] == 11  # the first batch is measured, and computed twice
    assert forwards[1] == 11 if delay == 0 else 11 < forwards[1] < 20


def test_a_graph_is_measured_without_the_weights() -> None:
    """Linear saves x (3, 8), Tanh its output (3, 5), the second Linear that again."""
    module, x = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(3, 8)
    graphs, size = Graphs(1000), 4 * (3 * 8 + 3 * 5)
    assert not graphs.room(x)
    with graphs.measured(module, x):
        module(x)
    assert graphs.room(x) == size
    graphs.taken = 5 * size
    assert graphs.room(x) == size
    graphs.taken = 6 * size
    assert not graphs.room(x)


def test_a_larger_batch_is_measured_anew_and_a_smaller_one_counts_as_one_that_was() -> None:
    """Shapes may change: 3 samples first, then 9, 1 and 5."""
    module = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))
    graphs = Graphs(10_000)
    for samples in (3, 9):
        x = torch.randn(samples, 8)
        assert graphs.size(x) is None and not graphs.room(x)
        with graphs.measured(module, x):
            module(x)
    assert [graphs.room(torch.randn(samples, 8)) for samples in (1, 3, 5, 9, 10)] == [156, 156, 468, 468, 0]


@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_with_a_stash_the_gradient_is_that_of_the_weights_it_went_through_with(delay: int, lam: float) -> None:
    """Stage 0 is linear: its gradient at the old weights needs its old input only, and x.grad the old weights."""
    modules = [nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
    twin = copy.deepcopy(modules)
    fed(make_stages(modules, lambda k: Delayed(stash=lam), SGD), 10, delay)

    lower, middle, upper = twin
    lr = SGD(lower.parameters()).param_groups[0]["lr"]

    def apply(stage: nn.Module, x: Tensor, weights: tuple[Tensor, ...], g: Tensor) -> Tensor:
        old = [w.detach().clone().requires_grad_() for w in weights]
        x = x.detach().requires_grad_()
        *grads, back = torch.autograd.grad(F.linear(x, *old), [*old, x], g)
        with torch.no_grad():
            for p, w, d in zip(stage.parameters(), weights, grads, strict=True):
                p -= lr * (d + lam * d * d * (p - w))
        return back

    line = Line(make_stages(copy.deepcopy(twin), lambda k: Delayed(stash=lam), SGD), delay)
    order: list[tuple[int, str, int]] = []
    for k, stage in enumerate(line.stages):
        handle = stage.handle
        stage.handle = lambda m, k=k, handle=handle: (order.append((k, type(m).__name__, m.batch)), handle(m))[1]  # type: ignore[method-assign,misc]
    line.feed(*(Activation(batch, x, y) for batch, (x, y) in enumerate(blobs(10), start=1)))
    line.run()
    data = dict(enumerate(blobs(10), start=1))
    h: dict[tuple[int, int], Tensor] = {}
    kept: dict[tuple[int, int], tuple[Tensor, tuple[Tensor, ...]]] = {}
    g: dict[tuple[int, int], Tensor] = {}
    for k, what, batch in order:
        x = data[batch][0] if k == 0 else h[k - 1, batch]
        if what == "Gradient":
            g[k - 1, batch] = apply(twin[k], *kept[k, batch], g[k, batch])
        elif k < 2:
            kept[k, batch] = x, tuple(p.detach().clone() for p in twin[k].parameters())
            h[k, batch] = twin[k](x).detach()
        else:
            x = x.detach().requires_grad_()
            *grads, g[1, batch] = torch.autograd.grad(
                F.cross_entropy(upper(x), data[batch][1]), [*upper.parameters(), x]
            )
            with torch.no_grad():
                for p, d in zip(upper.parameters(), grads, strict=True):
                    p -= lr * d
    for ours, theirs in zip(modules, (lower, middle, upper), strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_a_late_update_has_a_smaller_rate_until_the_delay_is_known_to_do_no_harm() -> None:
    """PipeMare: 0.1 τ^-(1 - batch/8), τ the updates that lay between."""
    stages = make_stages(two(), lambda k: Delayed(), SGD, reschedule=8)
    rates: list[list[float]] = [[], []]
    for k, stage in enumerate(stages):
        stage.descent.optimizer.register_step_pre_hook(
            lambda optimizer, *_, k=k: rates[k].append(optimizer.param_groups[0]["lr"])
        )
    fed(stages, 10, delay=3)
    late = [0, 1, 2, *[3] * 7]
    expected = [0.1 / max(1, n) ** max(0.0, 1 - b / 8) for b, n in enumerate(late, start=1)]
    assert rates[0] == pytest.approx(expected) and rates[1] == [0.1] * 10


# -- several batches an update -----------------------------------------------------------------------------------


def accumulated(modules: list[nn.Module], batches: int, m: int) -> nn.Module:
    """One process, plain autograd, the mean of m gradients an update."""
    model = nn.Sequential(*modules)
    optimizer = SGD(model.parameters())
    for batch, (x, y) in enumerate(blobs(batches), start=1):
        F.cross_entropy(model(x), y).backward()
        if batch % m == 0:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= m
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("rule", [Wait, Delayed])
def test_several_batches_make_one_update_bitwise_as_with_plain_autograd(rule: type[GradientRule]) -> None:
    stages = make_stages(layers(), lambda k: rule(), SGD, accumulate=3)
    one_at_a_time(line := Line(stages), 10)
    assert equal(stages, accumulated(layers(), 10, 3))
    assert [stage.updates for stage in stages] == [3, 3, 3]
    assert [word for word in line.log if "Gradient" in word] == [
        f"{k} Gradient {batch}" for batch in range(1, 11) for k in (2, 1)
    ]


@pytest.mark.parametrize(("m", "most"), [(1, 4), (4, 1), (6, 1)])
def test_with_a_round_trip_of_m_batches_no_gradient_is_more_than_one_update_late(m: int, most: int) -> None:
    """PipeDream-2BW (arXiv:2006.09503)."""
    stages = make_stages(two(), lambda k: Delayed(), SGD, accumulate=m)
    late: list[int] = []
    stages[0].metrics.received = lambda predicted, g, updates: late.append(updates)  # type: ignore[method-assign]
    fed(stages, 24, delay=4)
    assert len(late) == 24 and max(late) == most


def test_every_rule_can_accumulate() -> None:
    for rule, updates in (
        (lambda k: Synthetic(Learner(Fixed(0.1), 1e-3)), [3, 3, 3]),
        (lambda k: Local(Learner(VFBN(nn.Linear((12, 10)[k], 3), F.cross_entropy, 0.0), 1e-2)), [3, 3, 3]),
        (lambda k: Blend(Learner(Fixed(0.1), 1e-3), 1.0), [3, 3, 3]),
    ):
        stages = fed(make_stages(layers(), rule, SGD, accumulate=4), 14, delay=2)
        assert [stage.updates for stage in stages] == updates
        assert all(stage.in_flight == 0 for stage in stages)


@pytest.mark.parametrize("stages", [3, 2])
@pytest.mark.parametrize("cut", [4, 6, 7])
def test_a_run_cut_in_the_middle_of_an_update_goes_on_bitwise(tmp_path: Path, cut: int, stages: int) -> None:
    """Also with another number of stages: the gradients that are there already go by their weights' names."""

    def made(count: int) -> tuple[list[Stage], Plan]:
        model = nn.Sequential(*layers())
        planned = plan(model, count, tuple(range(1, count)), *next(blobs(1)), 3)
        adam = partial(torch.optim.Adam, lr=0.01)
        return make_stages([part(model, planned, k) for k in range(count)], lambda k: Delayed(), adam, accumulate=4), (
            planned
        )

    def trained(line: Line, first: int, last: int) -> None:
        for batch, (x, y) in list(enumerate(blobs(last), start=1))[first - 1 :]:
            line.feed(Activation(batch, x, y))
            line.run()

    uncut, planned = made(3)
    trained(Line(uncut), 1, cut)
    for k, stage in enumerate(uncut):
        state = state_of(stage, planned)
        assert bool(state.gradients) is (cut != 4)
        checkpoint.save_part(tmp_path, cut, k, state)
    checkpoint.complete(tmp_path, cut, 3, {}, keep=1)
    trained(Line(uncut), cut + 1, 12)

    resumed, planned = made(stages)
    for stage in resumed:
        saved = checkpoint.newest(tmp_path).state_for(stage.module.state_dict(), boundary_of(stage, planned))
        load_state(stage, saved)
    trained(Line(resumed), cut + 1, 12)
    assert equal(resumed, nn.Sequential(*(stage.module for stage in uncut)))
    assert not equal(resumed, nn.Sequential(*layers()))
