"""Where each n-th gradient is carried: which batches are mended, what the others leave behind, and who is told when.

batch      1   2   3   4   5   6   7   8        n = 4
at once    ĝ   ĝ   ĝ   ĝ   ĝ   ĝ   ĝ   ĝ        each stage updates on every batch
joins                  └─► g − ĝ       └─►      two batches are mended
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dnipipe import checkpoint
from dnipipe.gradient_rules import Blend, Synthetic
from dnipipe.last_stage import LossGradient
from dnipipe.learner import Learner
from dnipipe.messages import Activation, Gradient, Message
from dnipipe.phases import Phases
from dnipipe.stage import Stage
from dnipipe.turns import Turns, Unanswered
from tests.conftest import Line, blobs, make_stages
from tests.test_laboratory import train
from tests.test_processes import same
from tests.test_stage import SGD, Fixed, layers

BATCHES = 12


def in_turns(every: int, **options: Any) -> list[Stage]:
    """Three stages under blend; the last one's place is a loss that asks for nothing by turns."""
    stages = make_stages(layers(), lambda k: Blend(Learner(Fixed(0.01), 1e-3), 0.5, bp_lambda=1.0, **options), SGD)
    for stage in stages[:-1]:
        stage.rule = Turns(stage.rule, Unanswered(stage.rule), every)
    silent = LossGradient(F.cross_entropy, False, stages[-1].metrics.loss)
    stages[-1].rule = Turns(stages[-1].rule, silent, every)
    return stages


def test_each_nth_batch_is_mended_and_its_age_counts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, joined = in_turns(4)[0], []
    monkeypatch.setattr(stage.descent, "join", lambda _, __, weight, age, batch: joined.append((weight, age, batch)))
    for batch, (x, y) in enumerate(blobs(BATCHES), start=1):
        list(stage.handle(Activation(batch, x, y)))
        if batch > 5:  # what comes is five batches late
            list(stage.handle(Gradient(batch - 5, None if (batch - 5) % 4 else torch.ones(16, 12))))
    assert joined == [(0.5, 5, 9)]  # of batch 4; that of batch 8 would come behind the last
    assert stage.updates == BATCHES and stage.in_flight == 5


def test_all_stages_agree_on_whose_turn_it_is() -> None:
    stages = in_turns(4)
    line = Line(stages, delay=3)
    line.feed(*(Activation(batch, x, y) for batch, (x, y) in enumerate(blobs(BATCHES), start=1)))
    line.run()
    assert [stage.updates for stage in stages] == [BATCHES] * 3
    assert [stage.in_flight for stage in stages] == [0] * 3
    for stage in stages[:-1]:
        assert stage.metrics.totals()["staleness"] > 0 and stage.metrics.totals()["skipped"] == 0


@pytest.mark.parametrize(("batch", "waits"), [(3, False), (4, True)])
def test_a_batch_without_a_gradient_is_answered_at_once_and_keeps_nothing_for_a_second_backward(
    batch: int, waits: bool
) -> None:
    stage = in_turns(4, stash=True)[1]
    x, y = next(blobs(1, features=12))
    first, *rest = stage.handle(Activation(batch, x, y))
    assert isinstance(first, Activation)
    if waits:
        assert rest == [] and stage.pending[batch].stash is not None and stage.pending[batch].x is not None
        (answer,) = stage.handle(Gradient(batch, torch.ones(16, 10)))
        assert isinstance(answer, Gradient) and answer.g is not None
    else:
        (answer,) = rest
        assert isinstance(answer, Gradient) and answer.g is None
        assert stage.pending[batch].stash is None and stage.pending[batch].x is None
        assert list(stage.handle(Gradient(batch, None))) == []
    assert stage.metrics.totals().get("skipped", 0) == 0 and not stage.pending


def test_how_late_gradients_are_is_read_off_those_that_come() -> None:
    """An answer without one is back sooner, for the next stage alone gives it: to look ahead by that were too short."""
    stages = in_turns(4)
    seen: list[int] = []
    lean = stages[0].descent.lean
    stages[0].descent.lean = lambda late: seen.append(late) or lean(late)  # type: ignore[method-assign, func-returns-value]
    stages[0].late = 7
    list(stages[0].handle(Activation(1, *next(blobs(1)))))
    list(stages[0].handle(Gradient(1, None)))
    list(stages[0].handle(Activation(4, *next(blobs(1)))))
    assert seen == [0, 7]  # none for a batch that has no late gradient


@pytest.mark.parametrize("meanwhile", ["zero", "local"])
def test_a_prediction_that_is_not_trusted_is_used_as_the_rule_says(meanwhile: str) -> None:
    inner = Blend(Learner(Fixed(0.01), 1e-3), 0.5, warmup=2, meanwhile=meanwhile)
    rule = Unanswered(inner)
    h, y = torch.randn(4, 12), torch.tensor([0, 1, 2, 0])
    used = [rule.now(batch, h, y) for batch in (1, 2, 3)]
    assert [use.update for use in used] == [meanwhile == "local"] * 2 + [True]  # type: ignore[union-attr]
    assert inner._order == {} and not inner._distrusted  # nothing is to come


def test_a_phase_hands_its_batches_on_to_whose_turn_it_is() -> None:
    one = Synthetic(Learner(Fixed(0.01), 1e-3))
    rule = Phases([(1, one), (5, Turns(one, Unanswered(one), 4))])
    assert [isinstance(rule.at(batch), Unanswered) for batch in (1, 4, 5, 7, 8)] == [False, False, True, True, False]
    assert rule.teaches and not rule.at(5).teaches


# -- from the settings -------------------------------------------------------------------------------------------

BLEND = {"rule__name": "blend", "transport__delay": 2}


def test_where_no_batchs_turn_comes_blend_is_local(tmp_path: Path) -> None:
    train(tmp_path / "blend", wire__gradient_every=1000, **BLEND)
    train(tmp_path / "local", rule__name="local", transport__delay=2)
    train(tmp_path / "turns", wire__gradient_every=3, **BLEND)
    weights = {name: checkpoint.weights(tmp_path / name) for name in ("blend", "local", "turns")}
    assert same(weights["blend"], weights["local"]) and not same(weights["turns"], weights["local"])


@pytest.mark.parametrize("more", [{}, {"rule__p_update": 0.5}, {"rule__then": "31:local"}], ids=["", "drawn", "then"])
def test_every_batch_counts_and_a_run_repeats(tmp_path: Path, more: dict[str, Any]) -> None:
    told = [train(tmp_path / name, wire__gradient_every=5, **BLEND, **more) for name in "ab"]
    assert same(*(checkpoint.weights(tmp_path / name) for name in "ab"))
    for stage in told[0]["stage"]:
        assert set(stage["reasons"]) <= {"not drawn", "no gradient came"}
        assert stage["batches"] == 50


def test_a_run_that_goes_on_keeps_to_the_batches_whose_turn_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rule__name": "blend", "wire__gradient_every": 4, "pipeline__stages": 2}
    train(tmp_path / "run", train__batches=22, **settings)
    came: list[int] = []
    on_gradient = Stage.on_gradient

    def noted(stage: Stage, message: Gradient) -> Iterator[Message]:
        came.extend([message.batch] * (message.g is not None))
        return on_gradient(stage, message)

    monkeypatch.setattr(Stage, "on_gradient", noted)
    train(tmp_path / "run", "--resume", str(tmp_path / "run"), **settings)
    assert came == [24, 28, 32, 36, 40, 44, 48]
