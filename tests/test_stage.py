"""The journey of a batch, drawn as the messages that a line of stages sends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe.errors import MessageError, NonFiniteLoss
from dnipipe.gradient_rules import Blend, Delayed, GradientRule, Local, Synthetic, Wait
from dnipipe.labels import loss_terms
from dnipipe.learner import Learner
from dnipipe.lessons import Distance
from dnipipe.messages import Activation, Answer, Checkpoint, Evaluation, Gradient, Saved
from dnipipe.predictors import VFBN, Predictor
from dnipipe.randomness import reseed
from dnipipe.stage import POISONED, Stage, score
from tests.conftest import Line, blobs, make_stages, narrow

SGD = partial(torch.optim.SGD, lr=0.1)


class Fixed(Predictor):
    """Guesses the same gradient always; remembers what it was taught."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__(Distance())
        self.value = nn.Parameter(torch.tensor(value))
        self.taught: list[Tensor] = []

    def predict(self, h: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(h, self.value.item())

    def terms(self, h: Tensor, y: Tensor) -> Tensor:
        return 0 * self.value.expand_as(h)

    def loss(self, h: Tensor, y: Tensor, g: Tensor) -> Tensor:
        self.taught.append(g)
        return self.terms(h, y).sum()


def fixed(value: float = 0.0) -> Learner:
    return Learner(Fixed(value), 1e-3)


class Oracle(Predictor):
    """Knows the rest of the model, and so the true gradient; it has nothing to learn."""

    def __init__(self, rest: list[nn.Module]) -> None:
        super().__init__(Distance(), matching=0.0)
        self.rest = rest
        self.unused = nn.Parameter(torch.zeros(()))

    def predict(self, h: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(nn.Sequential(*self.rest)(h), y), h)
        return g

    def terms(self, h: Tensor, y: Tensor) -> Tensor:
        return loss_terms(y) * self.predict(h, y)


def layers(seed: int = 0, dropout: float = 0.0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(dropout)),
        nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(10, 3),
    ]


def plain(modules: list[nn.Module], batches: int) -> nn.Module:
    """One process, plain autograd."""
    model = nn.Sequential(*modules)
    optimizer = SGD(model.parameters())
    for x, y in blobs(batches):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def equal(stages: list[Stage], model: nn.Module) -> bool:
    """Bitwise, buffers included."""
    ours = [t for stage in stages for t in stage.module.state_dict().values()]
    return all(torch.equal(a, b) for a, b in zip(ours, model.state_dict().values(), strict=True))


def one_at_a_time(line: Line, batches: int) -> None:
    for batch, (x, y) in enumerate(blobs(batches), start=1):
        line.feed(Activation(batch, x, y))
        line.run()


# -- the journey -------------------------------------------------------------------------------------------------


def test_a_stage_sends_its_activation_before_it_learns_and_its_gradient_before_it_steps() -> None:
    stages = make_stages(layers(), lambda k: Synthetic(fixed(0.01)), SGD)
    stage, (x, y) = stages[1], next(blobs(1, features=12))
    before = copy.deepcopy(stage.module.state_dict())
    journey = stage.handle(Activation(1, x, y))
    assert isinstance(next(journey), Activation)
    assert all(p.grad is None for p in stage.module.parameters())
    sent = next(journey)
    assert isinstance(sent, Gradient) and sent.g is not None and sent.g.shape == x.shape
    assert torch.equal(stage.module.state_dict()["0.weight"], before["0.weight"])
    assert next(journey, None) is None
    assert not torch.equal(stage.module.state_dict()["0.weight"], before["0.weight"])
    assert stage.pending[1].x is None and not stage.pending[1].h.requires_grad


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # λ = 0: the middle stage answers at once, from its own guess
        (lambda k: Synthetic(fixed()), "0 Activation | 1 Activation | 1 Gradient | 2 Gradient"),
        (lambda k: Blend(fixed(), 1.0), "0 Activation | 1 Activation | 1 Gradient | 2 Gradient"),
        # λ > 0, warm-up and Wait: it answers when it has been answered
        (
            lambda k: Synthetic(fixed(), bp_lambda=0.5),
            "0 Activation | 1 Activation | 2 Gradient | 1 Gradient",
        ),
        (
            lambda k: Synthetic(fixed(), warmup=9),
            "0 Activation | 1 Activation | 2 Gradient | 1 Gradient",
        ),
        (lambda k: Wait(), "0 Activation | 1 Activation | 2 Gradient | 1 Gradient"),
        (lambda k: Delayed(), "0 Activation | 1 Activation | 2 Gradient | 1 Gradient"),
    ],
    ids=["synthetic", "blend", "bp-lambda", "warm-up", "wait", "delayed"],
)
def test_the_messages_of_one_batch(rule: object, expected: str) -> None:
    line = Line(make_stages(layers(), rule, SGD))  # type: ignore[arg-type]
    one_at_a_time(line, 1)
    assert line.log == [f"{word} 1" for word in expected.split(" | ")]
    assert all(stage.in_flight == 0 for stage in line.stages)


# -- proofs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Wait, Delayed])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_with_one_batch_in_flight_wait_and_delayed_equal_plain_autograd_bitwise(
    cut: int, rule: type[GradientRule]
) -> None:
    parts = {1: [slice(0, 3)], 2: [slice(0, 1), slice(1, 3)], 3: [slice(0, 1), slice(1, 2), slice(2, 3)]}[cut]
    modules = layers()
    stages = make_stages([nn.Sequential(*modules[part]) for part in parts], lambda k: rule(), SGD)
    one_at_a_time(Line(stages), 50)
    assert equal(stages, plain(layers(), 50))


@pytest.mark.parametrize(
    "rule",
    [lambda oracle: Synthetic(Learner(oracle, 1e-3)), lambda oracle: Blend(Learner(oracle, 1e-3), 1.0)],
    ids=["synthetic", "blend"],
)
def test_with_an_oracle_synthetic_and_blend_equal_plain_autograd(rule: Callable[[Oracle], GradientRule]) -> None:
    """Proof (c): a predictor that returns the true gradient makes the rule plain backprop.

    The stages behind must not have moved yet when the oracle looks, so a batch goes through the line one by one and
    the oracle looks before they update: it does, for a stage asks its rule as soon as it has sent its activation on.
    """
    modules = [layers()[0], nn.Tanh(), layers()[2]]
    modules[1] = nn.Linear(12, 10)
    twin = copy.deepcopy(modules)
    stages = make_stages(modules, lambda k: rule(Oracle(modules[k + 1 :])), SGD)
    line = Line(stages)
    one_at_a_time(line, 50)
    model = plain(twin, 50)
    for ours, theirs in zip((p for m in modules for p in m.parameters()), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    untrained = [p for m in (layers()[0],) for p in m.parameters()]
    assert not torch.allclose(untrained[0], next(model.parameters()))


def test_bp_lambda_mixes_what_arrived_with_what_was_guessed() -> None:
    """Paper, appendix A.2: the stage before is taught J^T (λ g + (1-λ) ĝ)."""
    predictor = Fixed(0.25)
    modules: list[nn.Module] = [nn.Linear(8, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)]
    stages = make_stages(
        modules, lambda k: Synthetic(Learner(predictor, 1e-3), bp_lambda=0.75), partial(torch.optim.SGD, lr=0.0)
    )
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    list(stages[1].handle(Activation(1, x, y)))
    g = torch.randn(5, 4)
    (sent,) = stages[1].handle(Gradient(1, g))
    assert isinstance(sent, Gradient) and sent.g is not None
    weight = next(modules[1].parameters())
    torch.testing.assert_close(sent.g, (0.75 * g + 0.25 * 0.25) @ weight)


def test_bp_one_teaches_the_true_gradient_and_zero_the_guessed_one() -> None:
    for lam, true in ((1.0, True), (0.0, False)):
        taught = [Fixed(), Fixed()]
        modules = [nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
        x, y = next(blobs(1))
        h = modules[0](x).detach().requires_grad_()
        (truth,) = torch.autograd.grad(F.cross_entropy(modules[2](modules[1](h)), y), h)
        stages = make_stages(
            modules, lambda k: Synthetic(Learner(taught[k], 1e-3), bp_lambda=lam), partial(torch.optim.SGD, lr=0.0)
        )
        one = Line(stages)
        one.feed(Activation(1, x, y))
        one.run()
        (lesson,) = taught[0].taught
        assert lesson is not None
        assert torch.allclose(lesson, truth, atol=1e-7) is true


# -- batch norm, dropout, clipping, schedules --------------------------------------------------------------------


def test_a_forward_that_is_run_again_counts_batch_norm_once_and_drops_the_same() -> None:
    """Waiting runs each forward twice; statistics and masks must be those of one."""
    stages = make_stages(layers(dropout=0.5), lambda k: Wait(), SGD, seed=7)
    line = Line(stages)
    one_at_a_time(line, 5)
    model = nn.Sequential(*layers(dropout=0.5))
    norm = stages[0].module[1]  # type: ignore[index]
    assert norm.num_batches_tracked == 5
    stage = stages[0]
    x, _ = next(blobs(1))
    reseed(7, 0, 6)
    first = stage.module(x)
    statistics = norm.running_mean.clone()
    again = stage.passes.again(6, x, None)
    assert torch.equal(first, again)
    assert torch.equal(norm.running_mean, statistics)
    assert model is not None


def test_learning_rates_follow_the_batch_id_on_every_stage() -> None:
    stages = make_stages(layers(), lambda k: Synthetic(fixed(0.1)), SGD, schedule=lambda batch: 1.0 / batch)
    one_at_a_time(Line(stages), 4)
    assert [stage.descent.optimizer.param_groups[0]["lr"] for stage in stages] == [0.1 / 4] * 3


def test_a_stage_clips_its_own_gradient() -> None:
    module = nn.Linear(8, 3)
    before = [p.detach().clone() for p in module.parameters()]
    (stage,) = make_stages([module], lambda k: Wait(), partial(torch.optim.SGD, lr=1.0), clip=1e-3)
    one_at_a_time(Line([stage]), 1)
    moved = torch.cat([(p - q).flatten() for p, q in zip(module.parameters(), before, strict=True)]).norm()
    assert 0.9e-3 < moved.item() < 1.1e-3


# -- rules -------------------------------------------------------------------------------------------------------


def test_in_a_warm_up_the_predictor_learns_and_is_not_applied() -> None:
    for meanwhile, updates in (("zero", False), ("wait", True)):
        predictor = Fixed(100.0)
        stages = make_stages(
            [nn.Linear(8, 6), nn.Linear(6, 3)], lambda k: Synthetic(Learner(predictor, 1e-3), 0.0, 2, meanwhile), SGD
        )
        line, counts = Line(stages), []
        for batch, (x, y) in enumerate(blobs(3), start=1):
            line.feed(Activation(batch, x, y))
            line.run()
            counts.append(stages[0].updates)
        assert counts == ([1, 2, 3] if updates else [0, 0, 1])
        assert len(predictor.taught) == 3
        assert stages[0].metrics.totals()["cosine"] is not None


def test_local_sends_no_gradient_and_still_answers() -> None:
    def rule(k: int) -> Local:
        return Local(Learner(VFBN(nn.Linear((12, 10)[k], 3), F.cross_entropy, 0.0), 1e-2))

    stages = make_stages(layers(), rule, SGD)
    answers: list[Tensor | None] = []
    line = Line(stages)
    for batch, (x, y) in enumerate(blobs(30), start=1):
        line.feed(Activation(batch, x, y))
        line.run()
    for out in stages[1].handle(Activation(31, torch.randn(16, 12), y)):
        if isinstance(out, Gradient):
            answers.append(out.g)
    assert answers == [None]
    assert [stage.updates for stage in stages] == [30, 31, 30]


@pytest.mark.parametrize("delay", [0, 3])
def test_synthetic_gradients_train_where_frozen_stages_do_not(delay: int) -> None:
    """Three stages on blobs that a random first layer of 2 features cannot tell apart."""

    def losses(warmup: int) -> float:
        modules, learners = narrow()
        stages = make_stages(
            modules,
            lambda k: Synthetic(learners[k], 0.0, warmup, "zero"),
            partial(torch.optim.Adam, lr=5e-3),
        )
        line = Line(stages, delay)
        line.feed(*(Activation(batch, x, y) for batch, (x, y) in enumerate(blobs(300, seed=5), start=1)))
        line.run()
        x, y = list(blobs(301, seed=5))[-1]
        for stage in stages:
            stage.module.eval()
        with torch.no_grad():
            return F.cross_entropy(nn.Sequential(*modules)(x), y).item()

    assert losses(warmup=0) < 0.8 * losses(warmup=10**6)


# -- evaluation, checkpoints, failures ---------------------------------------------------------------------------


def test_evaluation_leaves_no_trace_and_is_complete() -> None:
    stages = make_stages(layers(dropout=0.5), lambda k: Wait(), SGD)
    one_at_a_time(line := Line(stages), 3)
    before = [t.clone() for stage in stages for t in stage.module.state_dict().values()]
    data = list(blobs(2, size=7, seed=9))
    line.feed(*(Evaluation(number, x, y) for number, (x, y) in enumerate(data, start=1)))
    line.run()
    after = [t for stage in stages for t in stage.module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    totals = sum(message.h for message in line.taken if isinstance(message, Answer))
    model = nn.Sequential(*(stage.module for stage in stages)).eval()
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    expected = score(model(x), y, F.cross_entropy)
    torch.testing.assert_close(totals, expected)
    assert expected[3] == 14


def test_a_checkpoint_stands_right_behind_the_update_on_its_batch() -> None:
    for rule in (
        lambda k: Wait(),
        lambda k: Delayed(),
        lambda k: Synthetic(fixed(0.1)),
        lambda k: Blend(fixed(0.1), 1.0),  # what was still on its way, to learn and to mend, is not part of it
    ):
        stages = make_stages(layers(), rule, SGD)  # type: ignore[arg-type]
        line = Line(stages, delay=2)
        cuts: dict[int, int] = {}
        send = line.send

        def noting(k: int, message: object, send: object = send, cuts: dict[int, int] = cuts) -> None:
            if isinstance(message, Saved) and message.stage == k:
                cuts[k] = stages[k].updates
            send(k, message)  # type: ignore[operator]

        line.send = noting  # type: ignore[method-assign]
        (x, y), (x2, y2) = blobs(2)
        line.feed(Activation(1, x, y), Checkpoint(1))
        if not isinstance(stages[0].rule, Wait):
            line.feed(Activation(2, x2, y2))
        line.run()
        assert cuts == {0: 1, 1: 1, 2: 1}
        assert sorted(m.stage for m in line.taken if isinstance(m, Saved)) == [0, 1, 2]


def test_a_loss_that_is_not_finite_stops_or_skips() -> None:
    x, y = next(blobs(1))
    bad = x * float("nan")
    with pytest.raises(NonFiniteLoss, match=r"nan at batch 1.*on_nan"):
        one = Line(make_stages(layers()[:1], lambda k: Wait(), SGD))
        one.feed(Activation(1, bad, y))
        one.run()
    stages = make_stages(layers(), lambda k: Wait(), SGD, stop=False)
    line = Line(stages)
    line.feed(Activation(1, bad, y))
    line.run()
    assert [stage.updates for stage in stages] == [0, 0, 0]
    assert [dict(stage.metrics.skipped) for stage in stages] == [{POISONED: 1}, {}, {}]
    assert all(stage.in_flight == 0 for stage in stages)


class Spoils(nn.Module):
    """While it is armed it lets nothing through but infinity, as a layer does that overflows."""

    armed = False

    def forward(self, h: Tensor) -> Tensor:
        return h + float("inf") if self.armed else h


def careful(k: int) -> Learner:
    torch.manual_seed(k)
    return Learner(VFBN(nn.Linear(12 - 2 * k, 3), F.cross_entropy, 0.1), 3e-3, careful=True)


@pytest.mark.parametrize(("at", "why"), [(0, "output not finite"), (1, "output not finite"), (2, "loss not finite")])
@pytest.mark.parametrize(
    "rule",
    [
        lambda k: Synthetic(careful(k)),
        lambda k: Blend(careful(k), 0.5, bp_lambda=1.0, stash=True),
        lambda k: Local(careful(k)),
        lambda k: Wait(),
    ],
)
def test_a_batch_that_turns_into_infinity_leaves_no_trace(
    at: int, why: str, rule: Callable[[int], GradientRule]
) -> None:
    modules, spoils = layers(), Spoils()
    modules[at] = nn.Sequential(spoils, modules[at])  # before its BatchNorm
    line = Line(make_stages(modules, rule, SGD, stop=False))
    for batch, (x, y) in enumerate(blobs(6), start=1):
        spoils.armed = batch == 3
        line.feed(Activation(batch, x, y))
        line.run()
    for stage in line.stages:
        assert all(tensor.isfinite().all() for tensor in stage.module.state_dict().values())
        learnt = stage.rule.learner
        assert learnt is None or all(weights.isfinite().all() for weights in learnt.parameters)
    assert line.stages[at].metrics.skipped == {why: 1} and line.stages[2].updates == 5


def test_a_prediction_that_is_not_finite_teaches_nothing() -> None:
    stages = make_stages(layers(), lambda k: Synthetic(careful(k)), SGD, stop=False)
    x, y = next(blobs(1))
    learner = stages[0].rule.learner
    assert learner is not None
    sound = learner.predictor.task_loss  # type: ignore[attr-defined]
    learner.predictor.task_loss = lambda h, y: sound(h, y) * float("nan")  # type: ignore[attr-defined]
    learning = [*stages[0].module.parameters(), *learner.parameters]
    before = copy.deepcopy(learning)
    assert [type(out) for out in stages[0].handle(Activation(1, x, y))] == [Activation]
    assert stages[0].metrics.skipped == {"gradient not finite": 1}
    assert all(torch.equal(kept, now) for kept, now in zip(before, learning, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_a_neighbour_sends_must_be_finite(value: float) -> None:
    (x, y), (_, y2) = blobs(2)
    h = torch.randn(len(x), 12)
    spoilt = h.clone()
    spoilt[3, 4] = value
    for stop in (True, False):
        stage = make_stages(layers(), lambda k: Wait(), SGD, stop=stop)[1]
        before = copy.deepcopy(dict(stage.module.named_parameters()))
        if stop:
            with pytest.raises(
                NonFiniteLoss,
                match=r"activation that came to stage 1 holds NaN or infinity in batch 1: .*on_nan = skip",
            ):
                list(stage.handle(Activation(1, spoilt, y)))
            continue
        assert [type(out) for out in stage.handle(Activation(1, spoilt, y))] == [Gradient]  # and no Activation
        assert [type(out) for out in stage.handle(Activation(2, h, y2))] == [Activation]
        g = torch.full((len(x), 10), 0.1)
        g[3, 4] = value
        answers = list(stage.handle(Gradient(2, g)))
        assert [getattr(out, "g", h) for out in answers] == [None]
        assert stage.metrics.skipped == {POISONED: 1, "gradient not finite": 1} and stage.updates == 0
        assert all(torch.equal(before[name], p) for name, p in stage.module.named_parameters())


def test_a_sum_that_is_too_large_is_not_taken_for_infinity() -> None:
    stage = make_stages(layers(), lambda k: Wait(), SGD)[1]
    assert stage._usable(torch.full((2,), 3e38), 1, "activation")


def test_a_message_that_does_not_belong_here_is_refused() -> None:
    stages = make_stages(layers(), lambda k: Wait(), SGD)
    x, y = next(blobs(1))
    list(stages[0].handle(Activation(4, x, y)))
    for message in (
        Gradient(9, torch.zeros(16, 12)),
        Gradient(4, torch.zeros(16, 1)),
        Answer(1, torch.zeros(4)),
        Activation(4, x, y),
        "hello",
    ):
        with pytest.raises(MessageError):
            list(stages[0].handle(message))  # type: ignore[arg-type]


def test_of_a_gradient_of_some_samples_exactly_those_are_learnt_from() -> None:
    """In the unit of a batch of so many: as Learner takes a part of a whole one (predictor.rows)."""
    told: list[Tensor] = []
    for rows, samples in ((0.5, None), (1.0, torch.tensor([0, 1, 2]))):
        learner = Learner(Fixed(1.0), 1e-3, rows=rows)
        stage = make_stages(layers(), lambda k: Synthetic(learner), SGD)[0]
        (x, y), *_ = blobs(1, size=6)
        list(stage.handle(Activation(1, x, y)))
        g = torch.arange(72.0).reshape(6, 12)
        list(stage.handle(Gradient(1, g if samples is None else g[samples] * 2, samples=samples)))
        assert isinstance(learner.predictor, Fixed)
        told += learner.predictor.taught
    assert told[0].shape == (3, 12) and torch.equal(told[0], told[1])


def test_a_gradient_that_gave_way_teaches_nothing_and_is_counted() -> None:
    learner = fixed(1.0)
    stage = make_stages(layers(), lambda k: Synthetic(learner), SGD)[0]
    (x, y), *_ = blobs(1)
    list(stage.handle(Activation(1, x, y)))
    assert list(stage.handle(Gradient(1, None, full=True))) == [] and stage.in_flight == 0
    assert isinstance(learner.predictor, Fixed) and learner.predictor.taught == []
    assert stage.metrics.skipped == {"the link was full": 1} and stage.updates == 1


@pytest.mark.parametrize("samples", [[0, 6], [-1, 2], [], [0, 1, 2], [0.0, 1.0]], ids=str)
def test_samples_that_the_batch_does_not_have_are_refused(samples: list[float]) -> None:
    stage = make_stages(layers(), lambda k: Synthetic(fixed()), SGD)[0]
    (x, y), *_ = blobs(1, size=6)
    list(stage.handle(Activation(1, x, y)))
    with pytest.raises(MessageError, match="did not ask for this gradient of batch 1"):
        list(stage.handle(Gradient(1, torch.zeros(2, 12), samples=torch.tensor(samples))))
