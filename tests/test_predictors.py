"""Predictors: shapes, units, the zero start, and proof (d): on a frozen network they find the gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe.config import Predictor as Settings
from dnipipe.errors import ConfigError
from dnipipe.kinds import build
from dnipipe.labels import loss_terms
from dnipipe.learner import Learner
from dnipipe.predictors import VFBN, Completed, Edge
from tests.conftest import blobs

SAMPLES = Edge((6, 8), (6,), (6, 3), 3)
TOKENS = Edge((2, 5, 8), (2, 5), (2, 5, 11), 11)
SEQUENCE = Edge((6, 5, 8), (6,), (6, 3), 3)  # tokens in, one label a sample
IMAGES = Edge((6, 4, 7, 7), (6,), (6, 3), 3)
VALUES = Edge((6, 8), (6, 2), (6, 2), None)  # regression


def loss(h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(h, y) if y.is_floating_point() else F.cross_entropy(h.flatten(0, -2), y.flatten())


def example(edge: Edge) -> tuple[Tensor, Tensor]:
    y = torch.randn(edge.y) if edge.classes is None else torch.randint(edge.classes, edge.y)
    return torch.randn(edge.h), y


EVERY = [
    *(
        (Settings(name=name, condition=c), e)
        for name in ("linear", "mlp")
        for c in (True, False)
        for e in (SAMPLES, TOKENS, SEQUENCE)
    ),
    *((Settings(name="conv", condition=c), IMAGES) for c in (True, False)),
    *((Settings(name="vfbn", hidden=n), e) for n in (0, 2) for e in (SAMPLES, TOKENS, SEQUENCE, IMAGES, VALUES)),
    (Settings(name="vfbn", attention=2, hidden=1), TOKENS),
    (Settings(name="vfbn", attention=4), SEQUENCE),
    (Settings(name="vfbn", position=True), TOKENS),
    *((Settings(name="vfbn", sampled=4, hidden=n), TOKENS) for n in (0, 1)),
    *((Settings(name="vfbn", similarity=0.9), e) for e in (SAMPLES, TOKENS)),
    *((Settings(name="vfbn", residual=True), e) for e in (SAMPLES, TOKENS, SEQUENCE, IMAGES)),
    (Settings(name="vfbn", residual=True, condition=False), VALUES),
    (Settings(name="linear", condition=False), VALUES),
]


@pytest.mark.parametrize(("settings", "edge"), EVERY)
def test_a_guess_has_the_shape_of_h_and_a_step_lowers_the_loss(settings: Settings, edge: Edge) -> None:
    torch.manual_seed(0)
    predictor = build(settings, edge, loss)
    h, y = example(edge)
    g = torch.randn_like(h) / loss_terms(y)
    learner, losses, own = Learner(predictor, 1e-2), [], []
    guess = learner.guess(h, y)
    assert guess.shape == h.shape and not guess.requires_grad
    if settings.name != "vfbn":
        assert torch.equal(guess, torch.zeros_like(h))  # the paper: initially zero synthetic gradient
    for _ in range(8):
        value, at_once = predictor.loss(h, y, g), predictor.own_loss(h, y)
        assert value.dim() == 0
        losses.append(value.item())
        if at_once is None:
            learner.learn(h, y, g)
        else:
            own.append(at_once.item())
            learner.guess(h, y)
    assert bool(own) is (settings.name == "vfbn")
    assert (own or losses)[-1] < (own or losses)[0]
    assert all(p.grad is None or not p.grad.any() for p in predictor.parameters())


@pytest.mark.parametrize("settings", [Settings(name="linear"), Settings(name="vfbn", matching=1.0)])
def test_targets_do_not_shrink_with_the_batch(settings: Settings) -> None:
    """A batch given twice over has half the gradient per element, and the same predictor loss: it is per loss term."""
    torch.manual_seed(0)
    predictor = build(settings, SAMPLES, loss)
    h, y = example(SAMPLES)
    g = torch.randn_like(h) / len(h)
    once = predictor.loss(h, y, g)
    twice = predictor.loss(torch.cat([h, h]), torch.cat([y, y]), torch.cat([g, g]) / 2)
    torch.testing.assert_close(once, twice)
    learner = Learner(predictor, 0.0)
    torch.testing.assert_close(learner.guess(torch.cat([h, h]), torch.cat([y, y]))[:6], learner.guess(h, y) / 2)


def test_the_regression_loss_is_summed_over_features_and_averaged_over_terms() -> None:
    predictor = build(Settings(name="linear"), SAMPLES, loss)
    h, y = example(SAMPLES)
    g = torch.randn_like(h)
    expected = sum(((6 * g[b]) ** 2).sum() for b in range(6)) / 6
    torch.testing.assert_close(predictor.loss(h, y, g), expected)


def test_vfbn_guesses_its_heads_own_gradient() -> None:
    predictor = build(Settings(name="vfbn"), SAMPLES, loss)
    assert isinstance(predictor, VFBN)
    h, y = example(SAMPLES)
    h.requires_grad_()
    (expected,) = torch.autograd.grad(predictor.own_loss(h, y), h)
    before = predictor.own_loss(h, y).item()
    torch.testing.assert_close(Learner(predictor, 1e-3).guess(h, y), expected)
    assert predictor.own_loss(h, y).item() < before  # and has learnt from that very batch


def test_vfbn_learns_from_what_arrives_only_how_far_off_it_was() -> None:
    torch.manual_seed(0)
    predictor = build(Settings(name="vfbn", matching=2.0), SAMPLES, loss)
    h, y = example(SAMPLES)
    guess = Learner(predictor, 0.0).guess(h, y)
    off = torch.zeros_like(h)
    off[2, 3] = 0.5
    value = predictor.loss(h, y, guess + off)
    torch.testing.assert_close(value, torch.tensor(2.0 * 6 * 0.25))  # matching · N · Σ
    deaf = build(Settings(name="vfbn", matching=0.0), SAMPLES, loss)
    before = [p.detach().clone() for p in deaf.parameters()]
    Learner(deaf, 0.1).learn(h, y, guess + off)
    assert all(torch.equal(p, was) for p, was in zip(deaf.parameters(), before, strict=True))


def test_what_stands_beside_a_head_begins_at_zero_and_learns_what_the_head_misses() -> None:
    """The head learns from its own loss alone, and so stays what it is when gradients arrive."""
    torch.manual_seed(0)
    predictor = build(Settings(name="vfbn", residual=True, matching=1.0), SAMPLES, loss)
    assert isinstance(predictor, Completed)
    h, y = example(SAMPLES)
    own = h.clone().requires_grad_()
    (expected,) = torch.autograd.grad(predictor.own_loss(own, y), own)
    torch.testing.assert_close(Learner(predictor, 0.0).guess(h, y), expected)
    learner, missed = Learner(predictor, 1e-2), torch.randn(8) / 6
    head = [p.detach().clone() for p in predictor.head.parameters()]
    for _ in range(300):
        learner.learn(h, y, expected + missed)
    assert all(torch.equal(p, was) for p, was in zip(predictor.head.parameters(), head, strict=True))
    torch.testing.assert_close(Learner(predictor, 0.0).guess(h, y), expected + missed, atol=2e-2, rtol=0)


def frozen(settings: Settings) -> float:
    """Cosine between guess and truth on fresh batches, after learning from a frozen network's true gradients."""
    torch.manual_seed(0)
    below = nn.Linear(8, 3)
    learner = Learner(build(settings, Edge((32, 8), (32,), (32, 3), 3), loss), 1e-2)
    cosines = []
    for step, (x, y) in enumerate(blobs(600, 32)):
        y = y[torch.randperm(len(y))]  # so that a label cannot be told from h
        h = x.requires_grad_()
        (g,) = torch.autograd.grad(loss(below(h), y), h)
        if step >= 580:
            cosines.append(F.cosine_similarity(learner.guess(h, y).flatten(), g.flatten(), dim=0).item())
        else:
            learner.learn(h.detach(), y, g)
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize(
    "settings",
    [Settings(name="linear"), Settings(name="mlp"), Settings(name="vfbn", matching=30.0)],
    ids=lambda s: s.name,
)
def test_on_a_frozen_network_the_gradient_is_found(settings: Settings) -> None:
    """Proof (d). Below stands a linear layer, untrained, with a cross-entropy: a VFBN head can be that very layer (if
    matching outweighs its own loss, which pulls it towards a trained one); for the linear predictor, W^T (softmax - y)
    is near linear in h and the label."""
    assert frozen(settings) > 0.9


def test_without_labels_it_cannot_be_found() -> None:
    """The control: what conditioning is for. The same predictor, blind to the labels, stays far below."""
    assert frozen(Settings(name="linear", condition=False)) < 0.8


@pytest.mark.parametrize(
    ("settings", "edge", "message"),
    [
        (Settings(name="linear", hidden=1), SAMPLES, "use predictor.name = mlp"),
        (Settings(name="linear"), IMAGES, r"shape \(6, 4, 7, 7\): use predictor.name = conv"),
        (Settings(name="conv"), SAMPLES, r"needs an activation \(B, C, H, W\)"),
        (Settings(name="linear"), VALUES, "are no classes.*condition = false"),
        (Settings(name="vfbn", attention=3), TOKENS, r"attention = 3 needs .* D a multiple of it, .*\(2, 5, 8\)"),
        (Settings(name="vfbn", position=True), SAMPLES, r"needs an activation \(B, T, D\)"),
        (Settings(name="vfbn", attention=2), SAMPLES, r"needs an activation \(B, T, D\)"),
        (Settings(name="vfbn", sampled=1), VALUES, "labels are no classes: leave predictor.sampled at 0"),
        (
            Settings(name="vfbn", residual=True, matching=0.0),
            SAMPLES,
            "nothing would teach it .*; set predictor.matching = 1",
        ),
        (Settings(name="vfbn", similarity=0.5), IMAGES, "needs rows with a class each"),
        (Settings(name="vfbn", similarity=0.5), VALUES, "are no classes: set predictor.similarity = 0"),
        (Settings(name="vfbn"), Edge((6, 8), (6, 4, 4), (6, 3, 4, 4), 3), "vfbn cannot guess"),
    ],
)
def test_what_does_not_fit_is_refused(settings: Settings, edge: Edge, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(settings, edge, loss)
