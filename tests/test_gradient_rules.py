"""The table at the top of gradient_rules.py, row by row; and BP(λ) against a calculation by hand.

now(batch, h, y) ─► Use or None       arrived(batch, h, y, g, ĝ) ─► Use or None       the predictor learns, or not
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe.beside import Beside
from dnipipe.config import build
from dnipipe.errors import ConfigError, NonFiniteLoss
from dnipipe.gradient_rules import (
    LEAST,
    RULES,
    Blend,
    Delayed,
    GradientRule,
    Local,
    Mend,
    Skip,
    Synthetic,
    Use,
    Wait,
)
from dnipipe.last_stage import LossGradient
from dnipipe.learner import Learner
from dnipipe.lessons import Distance
from dnipipe.messages import Activation
from dnipipe.phases import Phases
from dnipipe.predictors import VFBN, Predictor
from dnipipe.sometimes import Sometimes
from dnipipe.trust import READ, Trust
from tests.conftest import Line, make_stages

H, Y, G = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [-1.0, 8.0]])


class Constant(Predictor):
    """Guesses one number everywhere, and learns the mean of what arrives."""

    def __init__(self, value: float = 0.25) -> None:
        super().__init__(Distance())
        self.value = nn.Parameter(torch.tensor(value))
        self.taught: list[Tensor] = []

    def predict(self, h: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(h, self.value.item())

    def terms(self, h: Tensor, y: Tensor) -> Tensor:
        return len(y) * self.value.expand_as(h)

    def loss(self, h: Tensor, y: Tensor, g: Tensor) -> Tensor:
        self.taught.append(g)
        return (self.value - g.mean()) ** 2


GUESS = torch.full_like(H, 0.25)


def same(found: Use | Mend | None, expected: tuple[Any, ...] | None) -> bool:
    """Bitwise; a Use as (gradient, update, send), a Mend as (what was missed, weight, age, λ)."""
    if found is None or expected is None:
        return found is None and expected is None
    use = isinstance(found, Use)
    parts = (found.g, found.update, found.send) if use else (found.off, found.weight, found.age, found.bp_lambda)
    return all(
        torch.equal(part, wanted) if isinstance(part, Tensor) else part is wanted or part == wanted
        for part, wanted in zip(parts, expected, strict=True)
    )


# -- the table ---------------------------------------------------------------------------------------------------

UNTRUSTED = (GUESS, False, False)  # only measured


@pytest.mark.parametrize("wait", [True, False])
def test_a_prediction_that_is_not_trusted_is_only_measured(wait: bool) -> None:
    """As in a warm-up, batch by batch: what was asked before trust was lost is finished as it was begun."""
    rule = Synthetic(Learner(Constant(), 0.1, trust=Trust(0.5)), meanwhile="wait" if wait else "zero")
    for batch in range(1, 1 + READ):
        use = rule.now(batch, H, Y)
        assert use is not None and use.update and use.send
        assert rule.arrived(batch, H, Y, -use.g, use.g) is None  # the opposite of what was predicted
    use = rule.now(9, H, Y)
    assert use is not None and not use.update and not use.send
    rule.trust.good = True
    assert same(rule.arrived(9, H, Y, G, use.g), (G, wait, True))


def distrusted(meanwhile: str) -> tuple[Synthetic, Constant]:
    """A rule that has just found its predictions unlike what comes: a cosine of 0 with G − mean(G), over and over."""
    rule = Synthetic(Learner(predictor := Constant(), 0.0, trust=Trust(0.5)), meanwhile=meanwhile)
    for _ in range(READ):
        rule.trust.observe(GUESS, G - G.mean())
    assert not rule.trust.good
    return rule, predictor


def test_a_prediction_that_is_not_trusted_may_be_used_without_learning_from_what_arrives() -> None:
    rule, predictor = distrusted("local")
    use = rule.now(9, H, Y)
    assert same(use, (GUESS, True, True)) and use is not None
    assert rule.arrived(9, H, Y, G, use.g) is None and predictor.taught == []
    rule.trust.good = True
    rule.now(10, H, Y)
    rule.arrived(10, H, Y, G, use.g)
    assert len(predictor.taught) == 1


def test_a_prediction_that_is_not_trusted_may_be_used_in_part() -> None:
    """Its likeness is the part; at least LEAST, so that there is something whose likeness can be measured."""
    rule, predictor = distrusted("scale")
    for likeness, part in ((0.25, 0.25), (-0.7, LEAST)):
        rule.trust.likeness = likeness
        use = rule.now(9, H, Y)
        assert same(use, (GUESS * part, True, True)) and use is not None
        assert rule.arrived(9, H, Y, G, use.g) is None
    assert len(predictor.taught) == 2


def test_what_is_measured_of_a_prediction_used_in_part_is_all_of_it() -> None:
    rule, _ = distrusted("scale")
    before = rule.trust.length
    for batch in range(9, 9 + READ):
        use = rule.now(batch, H, Y)
        assert use is not None
        rule.arrived(batch, H, Y, G - G.mean(), use.g)
    assert rule.trust.length == pytest.approx(before)


@pytest.mark.parametrize(
    ("settings", "batch", "now", "arrived"),
    [
        ({"bp_lambda": 0.0}, 1, (GUESS, True, True), None),
        ({"bp_lambda": 0.5}, 1, (GUESS, True, False), ((G + GUESS) / 2, False, True)),
        ({"bp_lambda": 1.0}, 1, (GUESS, True, False), (G, False, True)),
        # in its warm-up; the last batch of it, and the first behind it
        ({"warmup": 3, "meanwhile": "wait"}, 3, UNTRUSTED, (G, True, True)),
        ({"warmup": 3, "meanwhile": "zero"}, 3, UNTRUSTED, (G, False, True)),
        ({"warmup": 3, "bp_lambda": 0.5}, 3, UNTRUSTED, (G, True, True)),
        ({"warmup": 3, "meanwhile": "wait"}, 4, (GUESS, True, True), None),
        ({"warmup": 3, "bp_lambda": 0.5}, 4, (GUESS, True, False), ((G + GUESS) / 2, False, True)),
    ],
    ids=["0", "half", "1", "warm-up-wait", "warm-up-zero", "warm-up-half", "behind-warm-up", "behind-warm-up-half"],
)
def test_synthetic(
    settings: dict[str, Any], batch: int, now: tuple[Tensor, bool, bool], arrived: tuple[Tensor, bool, bool] | None
) -> None:
    rule = Synthetic(Learner(predictor := Constant(), 0.1), **settings)  # type: ignore[arg-type]
    use = rule.now(batch, H, Y)
    assert same(use, now) and use is not None
    assert predictor.taught == []
    assert same(rule.arrived(batch, H, Y, G, use.g), arrived)
    assert [torch.equal(lesson, G) for lesson in predictor.taught] == [True]
    assert predictor.value.item() == pytest.approx(0.35)  # Adam's first step is its rate, towards the mean of G, 2
    assert rule.teaches


@pytest.mark.parametrize(
    ("settings", "batch", "now", "arrived"),
    [
        ({}, 1, (GUESS, True, True), (G - GUESS, 0.5, 0, 0.0)),
        ({"bp_lambda": 0.25}, 1, (GUESS, True, False), (G - GUESS, 0.5, 0, 0.25)),
        # in its warm-up; the last batch of it, and the first behind it
        ({"warmup": 3, "meanwhile": "wait"}, 3, UNTRUSTED, (G, True, True)),
        ({"warmup": 3, "meanwhile": "zero"}, 3, UNTRUSTED, (G, False, True)),
        ({"warmup": 3}, 4, (GUESS, True, True), (G - GUESS, 0.5, 0, 0.0)),
    ],
    ids=["0", "quarter", "warm-up-wait", "warm-up-zero", "behind-warm-up"],
)
def test_blend(settings: dict[str, Any], batch: int, now: tuple[Tensor, bool, bool], arrived: tuple[Any, ...]) -> None:
    """With w = 1/2; and from a gradient that was not made there is nothing to mend or to learn."""
    rule = Blend(Learner(predictor := Constant(), 0.1), 0.5, **settings)  # type: ignore[arg-type]
    use = rule.now(batch, H, Y)
    assert same(use, now) and use is not None
    assert rule.arrived(batch, H, Y, None, use.g) is None and predictor.taught == []
    assert same(rule.now(batch, H, Y), now)
    assert same(rule.arrived(batch, H, Y, G, use.g), arrived)
    assert [torch.equal(lesson, G) for lesson in predictor.taught] == [True]
    assert rule.teaches and rule.again


def test_blend_tells_how_old_a_correction_is() -> None:
    rule = Blend(Learner(Constant(), 0.1), 0.5)
    for batch in (1, 2, 3, 4):
        rule.now(batch, H, Y)
    for batch, age in ((1, 3), (3, 1), (4, 0)):
        assert same(rule.arrived(batch, H, Y, G, GUESS), (G - GUESS, 0.5, age, 0.0))


@pytest.mark.parametrize("settings", [{}, {"bp_lambda": 0.5}, {"warmup": 3}])
def test_synthetic_learns_nothing_from_a_gradient_that_was_not_made(settings: dict[str, float]) -> None:
    """The batch was skipped further down. A regression has no target then."""
    rule = Synthetic(Learner(predictor := Constant(), 0.1), **settings)  # type: ignore[arg-type]
    use = rule.now(1, H, Y)
    assert use is not None and rule.arrived(1, H, Y, None, use.g) is None
    assert predictor.value.item() == 0.25


def test_synthetic_mixes_with_what_was_guessed_then_not_with_what_would_be_now() -> None:
    rule = Synthetic(Learner(Constant(), 0.1), bp_lambda=0.25)
    first = rule.now(1, H, Y)
    assert first is not None
    rule.arrived(2, H, Y, G, first.g)  # meanwhile it learns
    assert same(rule.arrived(1, H, Y, G, first.g), (0.25 * G + 0.75 * GUESS, False, True))


@pytest.mark.parametrize("warmup", [0, 1])
def test_local_applies_its_own_loss_gradient_and_learns_in_the_same_backward(warmup: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(2, 2)
    h, untrained = H.clone().requires_grad_(), copy.deepcopy(head)
    (expected,) = torch.autograd.grad(F.cross_entropy(untrained(h), Y), h)
    rule = Local(Learner(VFBN(head, F.cross_entropy, matching=9.0), 0.1), warmup)
    assert same(rule.now(1, H, Y), (expected, warmup == 0, True))
    moved = copy.deepcopy(head.weight)
    assert not torch.equal(moved, untrained.weight)
    assert F.cross_entropy(head(H), Y) < F.cross_entropy(untrained(H), Y)
    assert rule.arrived(1, H, Y, G, expected) is None  # nothing arrives, and nothing would be learnt from it
    assert torch.equal(head.weight, moved) and not rule.teaches


@pytest.mark.parametrize("rule", [Delayed(), Wait()])
def test_delayed_and_wait(rule: GradientRule) -> None:
    assert rule.now(1, H, Y) is None
    assert same(rule.arrived(1, H, Y, G, None), (G, True, True))
    assert rule.arrived(1, H, Y, None, None) is None
    assert rule.teaches and rule.learner is None


def test_the_last_stage_has_the_true_gradient_and_tells_the_loss() -> None:
    told: list[tuple[float, int]] = []
    rule = LossGradient(F.cross_entropy, True, lambda value, terms: told.append((value.item(), terms)))
    share = (F.softmax(H, 1) - F.one_hot(Y, 2)) / 2  # of cross-entropy, by hand: (p - onehot) / N
    use = rule.now(1, H, Y)
    assert use is not None and (use.update, use.send) == (True, True)
    torch.testing.assert_close(use.g, share)
    assert told == [(F.cross_entropy(H, Y).item(), 2)]
    with pytest.raises(AssertionError, match="no stage follows the last"):
        rule.arrived(1, H, Y, G, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_or_is_skipped_and_never_told(bad: float) -> None:
    told: list[Tensor] = []

    def rule(stop: bool) -> LossGradient:
        return LossGradient(lambda h, y: h.sum() * bad, True, lambda value, terms: told.append(value), stop)

    with pytest.raises(NonFiniteLoss, match=rf"the loss is {bad} at batch 7: .*train\.on_nan = skip"):
        rule(stop=True).now(7, H, Y)
    assert rule(stop=False).now(7, H, Y) == Skip("loss not finite")
    assert told == []


class Later:
    """A GPU's lines that have taken nothing before they are waited for."""

    are_there = True

    def __init__(self) -> None:
        self.waited = 0

    def take(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    def mark(self, taken: bool = True) -> Callable[[bool], bool]:
        def done(wait: bool) -> bool:
            self.waited += wait
            return True

        return done


def test_on_a_gpu_a_loss_is_looked_at_with_the_next_batch_or_before_a_checkpoint() -> None:
    later, factor = Later(), [1.0]
    rule = LossGradient(lambda h, y: h.sum() * factor[0], True, lambda value, terms: None, True, cast(Beside, later))
    rule.now(1, H, Y)
    assert later.waited == 0
    factor[0] = float("nan")
    rule.now(2, H, Y)  # the first was fine
    assert later.waited == 1
    with pytest.raises(NonFiniteLoss, match="the loss is nan at batch 2"):
        rule.now(3, H, Y)
    rule.settle()  # it has been said
    rule.now(4, H, Y)
    for wrapped in (Sometimes(rule, 0.5, 0, 0), Phases([(1, rule)])):
        with pytest.raises(NonFiniteLoss, match="at batch 4"):
            wrapped.settle()
        rule.now(4, H, Y)


# -- BP(λ) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_bp_lambda_is_the_papers_recursion(lam: float, blend: bool) -> None:
    """Appendix A.2: what stage k-1 is taught is J_k^T (λ δ_k + (1-λ) ĝ_k), and δ_k is such a mixture itself.

    x ──·2──► h0 ──·3──► h1 ──·5──► h2 ──·7──► L = mean          one number a sample; N = 4 samples
              ĝ0         ĝ1         ĝ2         δ2 = 7/N = 1.75
    """
    modules: list[nn.Module] = []
    for weight in (2.0, 3.0, 5.0, 7.0):
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, weight)
        modules.append(layer)
    guesses = [Constant(0.5), Constant(-1.0), Constant(4.0)]
    still = partial(torch.optim.SGD, lr=0.0)

    def rule(k: int) -> Synthetic:
        learner = Learner(guesses[k], 0.0)
        return Blend(learner, 0.3, bp_lambda=lam) if blend else Synthetic(learner, bp_lambda=lam)

    stages = make_stages(modules, rule, still, loss=lambda h, y: h.mean())
    line = Line(stages)
    line.feed(Activation(1, torch.randn(4, 1), torch.zeros(4)))
    line.run()
    # λ = 1/4:  δ1 = 5 (1.75/4 + 3·4/4) = 17.1875;  δ0 = 3 (17.1875/4 - 3·1/4) = 10.640625
    taught = {0.0: (-3.0, 20.0, 1.75), 0.25: (10.640625, 17.1875, 1.75), 1.0: (26.25, 8.75, 1.75)}[lam]
    for predictor, expected in zip(guesses, taught, strict=True):
        (lesson,) = predictor.taught
        assert torch.equal(lesson, torch.full((4, 1), expected))


# -- out of the settings -----------------------------------------------------------------------------------------


def made(**rule: object) -> GradientRule:
    config = build({"rule": rule, "predictor": {"lr": 0.07}})
    return RULES[config.rule.name].build(config, lambda: Learner(VFBN(nn.Linear(2, 2), F.cross_entropy, 0.0), 0.07))


def test_a_rule_has_the_settings_it_was_given() -> None:
    for word in ("wait", "zero", "local", "scale"):
        rule = made(name="synthetic", bp_lambda=0.3, warmup=5, warmup_rule=word)
        assert isinstance(rule, Synthetic)
        assert (rule.bp_lambda, rule.warmup, rule.meanwhile) == (0.3, 5, word)
        assert rule.learner.adam.param_groups[0]["lr"] == 0.07
    rule = made(name="local", warmup=5)
    assert isinstance(rule, Local)
    assert rule.warmup == 5 and rule.learner.adam.param_groups[0]["lr"] == 0.07
    rule = made(name="blend", correction=0.3, bp_lambda=0.4, stash=False, warmup=5, warmup_rule="zero")
    assert isinstance(rule, Blend) and rule.learner.adam.param_groups[0]["lr"] == 0.07
    assert (rule.correction, rule.bp_lambda, rule.warmup, rule.meanwhile) == (0.3, 0.4, 5, "zero")
    assert rule.stash is None
    assert type(made(name="wait")) is Wait and type(made(name="delayed")) is Delayed


def test_local_needs_a_predictor_with_a_loss_of_its_own() -> None:
    config = build({"rule": {"name": "local"}, "predictor": {"name": "linear"}})
    with pytest.raises(ConfigError, match=r"predictor\.name = linear: use predictor\.name = vfbn"):
        Local.build(config, lambda: Learner(Constant(), 0.1))
