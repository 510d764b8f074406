"""Forward passes that wait for no other: who sends what when, where each lesson goes, and what an evaluation sees.

stage 0 ──Input 1──► stage 1 ──Input 1──► stage 2        passed on at once; each trains on its guess I_k(x)
        ──Activation 1──►    ──Activation 1──►           teaches I_k, and nothing else
        ◄──Gradient 1──      ◄──Gradient 1──             taken at the guess
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.errors import MessageError
from dnipipe.gradient_rules import GradientRule, Local, Synthetic
from dnipipe.inputs import Inputs
from dnipipe.last_stage import score
from dnipipe.learner import Learner
from dnipipe.messages import Activation, Answer, Checkpoint, Evaluation, Gradient, Input, Message, Saved
from dnipipe.predictors import VFBN
from dnipipe.randomness import chance
from dnipipe.sometimes import Sometimes
from dnipipe.stage import OVERFLOWN, POISONED, Stage
from dnipipe.unlocked import UnlockedStage
from tests import test_processes
from tests.conftest import Line, blobs, make_stages, narrow
from tests.test_laboratory import train
from tests.test_processes import same
from tests.test_stage import SGD, Fixed, Spoils, layers, one_at_a_time

WIDTHS = (8, 12, 10)  # features of x, h0, h1


def guessing(k: int, net: nn.Module | None = None) -> Inputs | None:
    """I_k for `layers`, by default a linear one."""
    torch.manual_seed(10 + k)
    return Inputs(net or nn.Linear(8, WIDTHS[k]), (16, 8), "float32", 0, 1e-2) if k else None


def unlocked(
    rule: Callable[[int], GradientRule],
    nets: tuple[nn.Module, ...] = (),
    modules: list[nn.Module] | None = None,
    stop: bool = True,
) -> list[UnlockedStage]:
    """Stages of `layers`; nets are I_1, I_2."""
    models = [guessing(k, nets[k - 1] if nets and k else None) for k in range(3)]
    made = make_stages(modules or layers(), rule, SGD, kind=lambda k: partial(UnlockedStage, models[k]), stop=stop)
    return [stage for stage in made if isinstance(stage, UnlockedStage)]


def fixed(k: int) -> GradientRule:
    return Synthetic(Learner(Fixed(0.01), 1e-3))


def copied(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def unchanged(module: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before, strict=True))


# -- the journey -------------------------------------------------------------------------------------------------


def test_the_messages_of_one_batch() -> None:
    """Stage 2 has its Input before stage 1 has computed anything."""
    line = Line(unlocked(fixed))
    one_at_a_time(line, 1)
    said = "0 Input | 0 Activation | 1 Input | 1 Activation | 1 Gradient | 2 Gradient"
    assert line.log == [f"{words} 1" for words in said.split(" | ")]
    assert all(stage.in_flight == 0 for stage in line.stages)


def test_a_stage_passes_the_input_on_before_it_computes_and_trains_without_its_activation() -> None:
    stage, (x, y) = unlocked(fixed)[1], next(blobs(1))
    before, journey = copied(stage.module), stage.handle(Input(1, x, y))
    passed = next(journey)
    assert isinstance(passed, Input) and torch.equal(passed.x, x) and torch.equal(passed.y, y)
    assert unchanged(stage.module, before)  # not even batch norm has counted
    activation, gradient = journey
    assert isinstance(activation, Activation) and isinstance(gradient, Gradient) and gradient.g is not None
    assert gradient.g.shape == (16, 12) and stage.updates == 1 and not unchanged(stage.module, before)


def test_the_activation_teaches_the_model_of_the_input_and_nothing_else() -> None:
    stage, (x, y) = unlocked(fixed)[1], next(blobs(1))
    list(stage.handle(Input(1, x, y)))
    assert stage.inputs is not None
    stood, net = copied(stage.module), copied(stage.inputs.net)
    h = torch.randn(16, 12)
    assert list(stage.handle(Activation(1, h, y))) == []
    assert unchanged(stage.module, stood) and not unchanged(stage.inputs.net, net)
    assert stage.updates == 1 and stage.last_batch == 1


def test_what_goes_back_is_the_gradient_at_the_guess() -> None:
    """J^T ĝ, J the stage's at I(x): by hand, for a stage that is not linear."""
    torch.manual_seed(0)
    modules = [nn.Linear(8, 12), nn.Sequential(nn.Linear(12, 10), nn.Tanh()), nn.Linear(10, 3)]
    stage, (x, y) = unlocked(fixed, modules=modules)[1], next(blobs(1))
    assert stage.inputs is not None
    guess = stage.inputs.net(x).detach().requires_grad_()
    module = copy.deepcopy(stage.module)
    (expected,) = torch.autograd.grad(module(guess), guess, torch.full((16, 10), 0.01))
    sent = [message for message in stage.handle(Input(1, x, y)) if isinstance(message, Gradient)]
    assert sent[0].g is not None and torch.equal(sent[0].g, expected)


def test_with_exact_guesses_it_is_the_locked_pipeline_bitwise() -> None:
    """Proof: stages that stand still, guessed by copies of themselves, say the same to each other."""

    def rule(k: int) -> Synthetic:
        torch.manual_seed(k)
        return Synthetic(Learner(VFBN(nn.Linear((12, 10)[k], 3), F.cross_entropy, 0.1), 1e-2))

    still = partial(torch.optim.SGD, lr=0.0)
    modules: list[nn.Module] = [nn.Sequential(nn.Linear(8, 12), nn.Tanh()), nn.Linear(12, 10), nn.Linear(10, 3)]
    nets = (None, modules[0], nn.Sequential(*modules[:2]))
    exact = [Inputs(copy.deepcopy(net), (16, 8), "float32", 0, 0.0) if net else None for net in nets]

    def told(kind: Callable[[int], Callable[..., Stage]]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        line = Line(make_stages(copy.deepcopy(modules), rule, still, kind=kind))
        send = line.send

        def noting(k: int, message: Message) -> None:
            if isinstance(message, (Activation, Gradient)):
                found.append(message.x if isinstance(message, Activation) else message.g)
            send(k, message)

        line.send = noting  # type: ignore[method-assign]
        one_at_a_time(line, 5)
        return found

    locked, free = told(lambda k: Stage), told(lambda k: partial(UnlockedStage, exact[k]))
    assert len(locked) == len(free) == 20
    assert all(torch.equal(a, b) for a, b in zip(locked, free, strict=True))


def test_the_guess_gets_better_and_the_metrics_say_how_good_it_is() -> None:
    """Of stages that stand still."""
    stages = unlocked(fixed)
    for stage in stages:
        stage.descent.schedule = lambda batch: 0.0
    line = Line(stages)
    errors: list[list[float]] = []
    for part in range(3):
        for batch, (x, y) in enumerate(blobs(100), start=1 + 100 * part):
            line.feed(Activation(batch, x, y))
            line.run()
        errors.append([stage.metrics.numbers(0, 1).get("input_error", -1.0) for stage in stages])
    assert errors[0][0] == -1.0  # stage 0 guesses nothing
    for k in (1, 2):
        assert errors[2][k] < 0.5 * errors[0][k]
        assert stages[k].metrics.totals()["input_error"] == pytest.approx(sum(e[k] for e in errors) / 3, rel=1e-4)


def test_an_evaluation_takes_the_real_activations() -> None:
    stages = unlocked(fixed)
    line = Line(stages)
    one_at_a_time(line, 5)
    nets = [copied(stage.inputs.net) for stage in stages if stage.inputs]
    x, y = next(blobs(1, seed=9))
    line.feed(Evaluation(1, x, y))
    line.run()
    (answer,) = (message for message in line.taken if isinstance(message, Answer))
    model = nn.Sequential(*(stage.module for stage in stages)).eval()
    torch.testing.assert_close(answer.h, score(model(x), y, F.cross_entropy))
    assert all(unchanged(stage.inputs.net, net) for stage, net in zip(stages[1:], nets, strict=True) if stage.inputs)


@pytest.mark.parametrize("rule", ["synthetic", "local"])
def test_it_learns_where_frozen_stages_do_not(rule: str) -> None:
    """The blobs of test_stage, with gradients and activations that come three rounds late."""

    def loss(warmup: int) -> float:
        modules, learners = narrow()
        nets = [nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, features)) for features in (2, 8)]
        models = [None, *(Inputs(net, (16, 8), "float32", 0, 1e-2) for net in nets)]

        def of(k: int) -> GradientRule:
            return Synthetic(learners[k], 0, warmup, "zero") if rule == "synthetic" else Local(learners[k], warmup)

        adam = partial(torch.optim.Adam, lr=5e-3)
        line = Line(make_stages(modules, of, adam, kind=lambda k: partial(UnlockedStage, models[k])), delay=3)
        data = list(blobs(630, seed=5))
        line.feed(*(Activation(batch, x, y) for batch, (x, y) in enumerate(data[:600], start=1)))
        line.run()
        model = nn.Sequential(*modules).eval()
        with torch.no_grad():
            return sum(F.cross_entropy(model(x), y).item() for x, y in data[600:]) / 30

    assert loss(warmup=0) < 0.3 * loss(warmup=10**6)


# -- what does not belong here -----------------------------------------------------------------------------------


def test_messages_out_of_place_are_refused() -> None:
    x, y = next(blobs(1))
    locked = make_stages(layers(), fixed, SGD)[1]
    with pytest.raises(MessageError, match="stage 1 cannot handle a Input"):
        locked.handle(Input(1, x, y))
    stage = unlocked(fixed)[1]
    list(stage.handle(Input(2, x, y)))
    for message, says in (
        (Input(2, x, y), "received batch 2 after batch 2"),
        (Input(3, x[:, 1:], y), r"the network's input is float32 \[16, 7\]"),
        (Activation(1, torch.zeros(16, 12), y), "had no input of batch 1 before its activation"),
        (Activation(3, torch.zeros(16, 12), y), "had no input of batch 3 before its activation"),
        (Activation(2, torch.zeros(16, 1), y), r"an activation \[16, 1\] came, where \[16, 12\] was guessed"),
        (Gradient(7, None), "did not ask for this gradient of batch 7"),
    ):
        with pytest.raises(MessageError, match=says):
            next(stage.handle(message))  # refused before anything is sent


# -- busy stages -------------------------------------------------------------------------------------------------


def test_a_busy_stage_passes_the_input_on_and_does_nothing_else() -> None:
    """batch     1   2   3 …       a stage that did not draw makes no forward; and where stage k-1 made none, I_k of
    stage 0      u   .   u         the next stage gets no lesson, nor does the predictor of stage k-1 if k made none"""
    batches, rows = 40, [[chance(0.5, 0, k, "update", batch) for batch in range(1, 41)] for k in range(3)]
    predictors = [Fixed(0.01), Fixed(0.01)]
    stages = unlocked(lambda k: Synthetic(Learner(predictors[k], 1e-3)))
    for k, stage in enumerate(stages):
        stage.rule = Sometimes(stage.rule, 0.5, 0, k)
    line = Line(stages)
    one_at_a_time(line, batches)
    forwards = [int(stages[k].module[1].num_batches_tracked) for k in (0, 1)]  # type: ignore[index]
    assert forwards == [sum(rows[0]), sum(rows[1])]
    assert [stage.updates for stage in stages] == [sum(row) for row in rows]
    for k in (1, 2):
        both = sum(a and b for a, b in zip(rows[k - 1], rows[k], strict=True))
        model = stages[k].inputs
        assert model is not None
        assert {int(state["step"]) for state in model.optimizer.state.values()} == {both}
        assert len(predictors[k - 1].taught) == both
    assert [word for word in line.log if "Input" in word] == [f"{k} Input {b}" for b in range(1, 41) for k in (0, 1)]
    assert all(stage.in_flight == 0 and not stage.pending for stage in stages)
    left = [stage.metrics.totals()["skipped.not drawn"] for stage in stages]
    assert left == [batches - sum(row) for row in rows]
    assert all(stage.metrics.totals()["batches"] == batches for stage in stages)


@pytest.mark.parametrize(("at", "why"), [(0, POISONED), (1, OVERFLOWN)])
def test_a_batch_that_turns_into_nan_is_answered_all_the_same(at: int, why: str) -> None:
    """Its Input went on before that was known, and the next stage, which has its own guess, learns from it."""
    modules, spoils = layers(), Spoils()
    modules[1] = nn.Sequential(spoils, modules[1])
    stages = unlocked(fixed, modules=modules, stop=False)
    line = Line(stages)
    for batch, (x, y) in enumerate(blobs(5), start=1):
        spoils.armed = batch == 3 and at == 1
        line.feed(Activation(batch, x * float("nan") if batch == 3 and at == 0 else x, y))
        line.run()
    assert stages[at].metrics.skipped[why] == 1 and all(stage.in_flight == 0 for stage in stages)
    assert all(tensor.isfinite().all() for stage in stages for tensor in stage.module.state_dict().values())


def test_a_batch_that_was_only_passed_on_takes_its_place_in_the_window_until_it_is_answered() -> None:
    stage, (x, y) = unlocked(fixed)[1], next(blobs(1))
    stage.rule = Sometimes(stage.rule, 0.5, 0, 1)
    busy = next(batch for batch in range(1, 99) if not stage.rule.draws(batch))
    first, second = stage.handle(Input(busy, x, y))
    assert isinstance(first, Input) and isinstance(second, Gradient) and second.g is None
    assert stage.in_flight == 1
    assert [type(m) for m in stage.handle(Checkpoint(busy))] == [Checkpoint, Saved]
    assert list(stage.handle(Activation(busy, torch.zeros(16, 12), y))) == []
    assert list(stage.handle(Gradient(busy, torch.zeros(16, 10)))) == []
    assert stage.in_flight == 0
    with pytest.raises(MessageError, match="did not ask"):
        list(stage.handle(Gradient(busy, None)))


# -- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 3])
def test_a_run_in_the_laboratory_repeats_bitwise_and_goes_on_bitwise(tmp_path: Path, delay: int) -> None:
    """Cut at batch 20: every lesson of I_k up to there has come, for its activation stands before the marker; and
    local learns from nothing else that could be under way."""
    settings = {"rule__name": "local", "rule__forward_unlock": True, "rule__p_update": 0.8, "transport__delay": delay}
    told = train(tmp_path / "whole", **settings)
    train(tmp_path / "cut", train__batches=20, **settings)
    train(tmp_path / "cut", "--resume", str(tmp_path / "cut"), **settings)
    assert same(checkpoint.weights(tmp_path / "whole"), checkpoint.weights(tmp_path / "cut"))
    errors = [stage["input_error"] for stage in told["stage"]]
    assert errors[0] is None and all(error > 0 for error in errors[1:])
    locked = train(tmp_path / "locked", rule__name="local", transport__delay=delay)
    assert [stage["input_error"] for stage in locked["stage"]] == [None] * 4
    assert not same(checkpoint.weights(tmp_path / "whole"), checkpoint.weights(tmp_path / "locked"))


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_a_run_over_processes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    unlocked = {"rule__name": "synthetic", "rule__forward_unlock": True, "rule__p_update": 0.7, "pipeline__stages": 3}
    status, _, err = test_processes.train(run, eval__every=20, **unlocked)
    assert status == 0, err
    told = json.loads((run / "summary.json").read_text())
    assert [stage["batches"] for stage in told["stage"]] == [50] * 3
    assert all(stage["input_error"] > 0 for stage in told["stage"][1:])
    assert all(10 < 50 - stage["reasons"]["not drawn"] < 50 for stage in told["stage"])
    assert all(stage["cosine"] is not None for stage in told["stage"][:2])
    assert told["eval"]["loss"] < 5.6
    assert checkpoint.newest(run).batch == 50
