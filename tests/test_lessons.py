"""What an arriving gradient teaches: the distance by hand, its unit, and which batches are gone over again.

g ─► Distance   rows, 1/N, s², cosine
  ─► Replay     newest first, 1/√(1 + age), `steps` times
  ─► Learner    a share of the rows; put off until there is time
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnipipe.config import Predictor as Settings
from dnipipe.kinds import build
from dnipipe.labels import loss_terms
from dnipipe.learner import Learner
from dnipipe.lessons import MEMORY, Distance, Replay, rows
from tests.test_predictors import IMAGES, SAMPLES, SEQUENCE, TOKENS, VALUES, example, loss


def test_a_row_is_what_a_loss_term_has_a_gradient_for() -> None:
    found = {edge: rows(torch.empty(edge.h), example(edge)[1]).shape for edge in (SAMPLES, TOKENS, SEQUENCE, VALUES)}
    assert found == {SAMPLES: (6, 8), TOKENS: (10, 8), SEQUENCE: (6, 40), VALUES: (6, 8)}
    assert rows(torch.empty(IMAGES.h), example(IMAGES)[1]).shape == (6, 4 * 7 * 7)


def test_the_distance_by_hand() -> None:
    a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    assert Distance()(a, b).item() == (16 + 25 + 4) / 2
    cosines = (1 - 3 / 5) + 1
    assert Distance(cosine=0.5)(a, b).item() == pytest.approx((45 + 0.5 * cosines) / 2)


def test_measured_by_the_size_of_what_arrives_a_distance_does_not_hang_on_the_unit() -> None:
    torch.manual_seed(0)
    target = torch.randn(50, 4)
    small, large = Distance(normalise=True), Distance(normalise=True)
    for _ in range(3):
        small.observe(1e-3 * target)
        large.observe(1e3 * target)
    torch.testing.assert_close(small(1e-3 * target + 5e-4, 1e-3 * target), large(1e3 * target + 5e2, 1e3 * target))
    assert large(0 * target, 1e3 * target).item() == pytest.approx(1)  # a guess of nothing is wrong by all there is


def test_the_size_follows_and_passes_over_what_is_no_size() -> None:
    distance = Distance(normalise=True)
    assert distance.scale == 1
    distance.observe(torch.full((2, 4), 3.0))
    assert float(distance.scale) == pytest.approx(6)  # √(4 · 9): the first is taken as it is
    for nothing in (0.0, float("nan"), float("inf")):
        distance.observe(torch.full((2, 4), nothing))
    assert float(distance.scale) == pytest.approx(6)
    for _ in range(10 * MEMORY):
        distance.observe(torch.full((2, 4), 0.5))
    assert float(distance.scale) == pytest.approx(1, rel=0.01)


def test_a_predictor_of_small_gradients_finds_them_if_it_knows_their_size() -> None:
    """Adam's steps are as long as its rate, whatever the target's size: 1e-4 cannot be hit in steps of 1e-2."""

    def error(normalise: bool) -> float:
        torch.manual_seed(0)
        learner = Learner(build(Settings(name="linear", normalise=normalise), SAMPLES, loss), 1e-2)
        for _ in range(300):
            h, y = example(SAMPLES)
            g = 1e-4 * h.flip(1)
            learner.learn(h, y, g)
        return float((learner.guess(h, y) - g).norm() / g.norm())

    assert error(True) < 0.5 < 1 < error(False)


def test_the_size_is_saved_with_the_predictor() -> None:
    one, other = (build(Settings(name="linear", normalise=True), SAMPLES, loss) for _ in range(2))
    h, y = example(SAMPLES)
    Learner(one, 1e-2).learn(h, y, 7 * torch.randn_like(h))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.predict(h, y), one.predict(h, y))  # type: ignore[arg-type]
    assert float(other.distance.scale) > 1
    assert "distance.size" not in build(Settings(name="linear"), SAMPLES, loss).state_dict()


class Spy:
    """A predictor's loss, and what it was asked for."""

    def __init__(self, learner: Learner) -> None:
        self.asked: list[list[float]] = []
        self.loss, learner.predictor.loss = learner.predictor.loss, self  # type: ignore[method-assign]
        self.step, learner.adam.step = learner.adam.step, self.stepped  # type: ignore[method-assign,assignment]
        self._now: list[float] = []

    def __call__(self, h: Tensor, y: Tensor, g: Tensor) -> Tensor:
        self._now.append(h[0, 0].item())
        return self.loss(h, y, g)

    def stepped(self) -> None:
        self.asked.append(self._now)
        self._now = []
        self.step()


def test_the_newest_are_gone_over_again_and_each_as_often_as_is_said() -> None:
    learner = Learner(build(Settings(name="linear"), SAMPLES, loss), 1e-2, Replay(2, steps=2))
    spy = Spy(learner)
    for number in range(4):
        h, y = torch.full(SAMPLES.h, float(number)), example(SAMPLES)[1]
        learner.learn(h, y, torch.randn_like(h))
    assert spy.asked == [[0], [0], [1, 0], [1, 0], [2, 1, 0], [2, 1, 0], [3, 2, 1], [3, 2, 1]]


def test_what_is_older_weighs_less() -> None:
    """Beside a batch that it fits already, an old one pulls with 1/√(1 + age) of its gradient."""
    replay = Replay(3)
    h, y = example(SAMPLES)
    for _ in range(3):
        replay.lesson(h, y, h)
    assert [weight for weight, *_ in replay.lesson(h, y, h)] == [1.0, 2**-0.5, 3**-0.5, 0.5]
    assert [len(Replay(0).lesson(h, y, h)) for _ in range(2)] == [1, 1]


def test_the_cosine_is_learnt_where_the_size_is_not() -> None:
    """From nothing but the cosine a guess finds the direction; it is told nothing of the length."""
    torch.manual_seed(0)
    predictor = build(Settings(name="linear", cosine=100.0), SAMPLES, loss)
    learner = Learner(predictor, 1e-2)
    h, y = example(SAMPLES)
    g = torch.randn_like(h) * 1e-3
    for _ in range(200):
        learner.learn(h, y, g)
    guess = learner.guess(h, y)
    assert F.cosine_similarity(guess, g, dim=1).mean() > 0.8
    assert loss_terms(y) * guess.norm() > 10 * loss_terms(y) * g.norm()


def test_a_share_of_the_samples_teaches_what_a_smaller_batch_would() -> None:
    """In that batch's own unit: d(its mean loss)/d(h) is larger, as its loss terms are fewer."""
    h, y = example(TOKENS)
    g = torch.randn(TOKENS.h)
    made = []
    for given, share in (((h, y, g), 0.3), ((h[:1], y[:1], g[:1] * h.shape[0]), 1.0)):
        torch.manual_seed(0)
        learner = Learner(build(Settings(), TOKENS, loss), 0.1, rows=share)
        learner.learn(*given)
        made.append(list(learner.parameters))
    for part, whole in zip(*made, strict=True):
        torch.testing.assert_close(part, whole)
    torch.manual_seed(0)
    untaught = Learner(build(Settings(), TOKENS, loss), 0.1).parameters
    assert not torch.allclose(made[0][0], untaught[0])


def test_what_is_put_off_is_learnt_in_its_order_and_of_too_many_the_newest_alone() -> None:
    h, y = example(TOKENS)
    lessons = [(h, y, g) for g in torch.randn(4, *TOKENS.h)]
    made = []
    for lazily, given in ((1, [0, 1]), (3, [0, 1]), (1, [2, 3]), (3, [0, 1, 2, 3])):
        torch.manual_seed(0)
        learner = Learner(build(Settings(), TOKENS, loss), 0.1, lazily=lazily)
        first = [p.detach().clone() for p in learner.parameters]
        for k in given:
            learner.learn(*lessons[k])
            if lazily > 1 and k < 2:
                assert all(map(torch.equal, learner.parameters, first))
        while learner.put_off:
            learner.catch_up()
        made.append((learner.unlearnt, learner.parameters))
    for (unlearnt, lazy), (_, at_once) in ((made[1], made[0]), (made[3], made[2])):
        assert unlearnt == (0 if lazy is made[1][1] else 2)
        for part, whole in zip(lazy, at_once, strict=True):
            assert torch.equal(part, whole)
