"""A run that changes its rule: each batch belongs to one rule for good, and the predictor goes on from rule to rule.

batch      1 … 5 │ 6 … 9          rule.name = "a", rule.then = "6:b"
                 gradient of 5, come late ─► a
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.config import build, phases
from dnipipe.errors import ConfigError
from dnipipe.gradient_rules import GradientRule, Local, Synthetic, Use, Wait
from dnipipe.learner import Learner
from dnipipe.messages import Activation
from dnipipe.phases import Phases
from dnipipe.predictors import VFBN
from dnipipe.window import Window
from tests.conftest import Line, blobs, make_stages
from tests.test_laboratory import train
from tests.test_processes import same


class Noted(GradientRule):
    """Writes down what it is asked."""

    teaches = True

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | None:
        self.log.append(f"{self.name} now {batch}")
        return None

    def arrived(self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None) -> Use | None:
        self.log.append(f"{self.name} arrived {batch}")
        return None


def test_a_batch_belongs_to_the_rule_that_it_came_under() -> None:
    log: list[str] = []
    rule = Phases([(1, Noted("a", log)), (6, Noted("b", log)), (8, Noted("c", log))])
    h, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for batch in (5, 6, 8):
        rule.now(batch, h, y)
    for batch in (5, 7, 90):
        rule.arrived(batch, h, y, h, None)
    assert log == ["a now 5", "b now 6", "c now 8", "a arrived 5", "b arrived 7", "c arrived 90"]


def test_a_lookahead_is_for_the_phase_whose_gradients_come_late(tmp_path: Path) -> None:
    """What `local` has learnt when `blend` begins is the same, however far `blend` will look ahead."""
    kept = []
    for ahead in (0, 10):
        run = tmp_path / str(ahead)
        train(
            run,
            rule__name="local",
            rule__then="31:blend",
            rule__lookahead=ahead,
            transport__delay=4,
            checkpoint__every=30,
            checkpoint__keep=9,
        )
        kept.append([checkpoint.at(run, batch).weights() for batch in (30, 50)])
    assert same(kept[0][0], kept[1][0]) and not same(kept[0][1], kept[1][1])


def test_a_warm_up_counts_from_where_its_rule_begins(tmp_path: Path) -> None:
    """20 batches of `wait`, then a predictor that is new: for 15 more its stage stays as it is."""
    run = tmp_path / "run"
    settings = {"rule__then": "21:synthetic", "rule__warmup": 15, "rule__warmup_rule": "zero", "predictor__hidden": 0}
    train(run, rule__name="wait", checkpoint__every=5, checkpoint__keep=20, **settings)
    first = [
        {name: tensor for name, tensor in checkpoint.at(run, batch).weights().items() if name.startswith("embedding")}
        for batch in (15, 20, 35, 40)
    ]
    assert [same(*pair) for pair in pairwise(first)] == [False, True, False]


def test_the_predictor_and_its_optimizer_go_from_rule_to_rule() -> None:
    """Local teaches the head once on each of 4 batches, Synthetic twice on each of 3 more, all with one Adam."""
    learner = Learner(VFBN(nn.Linear(6, 3), F.cross_entropy, 0.1), 1e-2)
    rule = Phases([(1, Local(learner)), (5, Synthetic(learner))])
    assert rule.learner is learner
    modules: list[nn.Module] = [nn.Linear(8, 6), nn.Linear(6, 3)]
    stages = make_stages(modules, lambda k: rule, lambda p: torch.optim.SGD(p, lr=0.1))
    line = Line(stages)
    line.feed(*(Activation(n, x, y) for n, (x, y) in enumerate(blobs(7), start=1)))
    line.run()
    assert {int(state["step"]) for state in learner.adam.state.values()} == {4 + 2 * 3}


def test_one_batch_at_a_time_while_the_rule_waits() -> None:
    """4 and 5 may be under way together; 6, which waits, only when both are back, and 8 only when 7 is."""
    learner = Learner(VFBN(nn.Linear(6, 3), F.cross_entropy, 0.1), 1e-2)
    rule = Phases([(1, Synthetic(learner)), (6, Wait()), (8, Synthetic(learner))])
    stages = make_stages([nn.Linear(8, 6), nn.Linear(6, 3)], lambda k: rule, lambda p: torch.optim.SGD(p, lr=0.1))
    stage, drawn = stages[0], list(blobs(9))
    came, answers = [], []
    for batch, (x, y) in enumerate(drawn, start=1):
        while not stage.room(Window(4)):
            came.append(answers[0].batch)
            list(stage.handle(answers.pop(0)))
        down = [m for m in stage.handle(Activation(batch, x, y)) if isinstance(m, Activation)]
        answers += [m for sent in down for m in stages[1].handle(sent)]
        came.append(-batch)
    # -n: batch n was taken; n: its gradient came
    assert came == [-1, -2, -3, -4, 1, -5, 2, 3, 4, 5, -6, 6, -7, -8, -9]


def test_a_schedule_is_what_a_resume_with_another_rule_is(tmp_path: Path) -> None:
    """Bitwise: waiting leaves nothing under way where the one is cut and the other changes its rule."""
    train(tmp_path / "one", rule__name="wait", rule__then="31:synthetic", transport__delay=0)
    cut = tmp_path / "cut"
    train(cut, rule__name="wait", transport__delay=0, train__batches=30)
    train(cut, "--resume", str(cut), rule__name="synthetic", transport__delay=0)
    assert same(*(checkpoint.weights(folder) for folder in (tmp_path / "one", cut)))


# -- out of the settings -----------------------------------------------------------------------------------------


def test_the_phases_of_a_configuration() -> None:
    assert phases(build({}).rule) == [(1, "blend")]
    config = build({"rule": {"name": "local", "then": "501:synthetic, 900:wait"}})
    assert phases(config.rule) == [(1, "local"), (501, "synthetic"), (900, "wait")]


@pytest.mark.parametrize(
    ("then", "part"), [("500", "500"), ("x:local", "x:local"), ("1:local", "1:local"), ("9:local,9:wait", "9:wait")]
)
def test_what_is_no_schedule_is_refused(then: str, part: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"rule\.then = '{then}': '{part}' should be BATCH:RULE, a batch id above \d"
    ):
        build({"rule": {"then": then}})
