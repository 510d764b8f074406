"""What a rule is said to cost a stage, beside what that stage is then seen to do.

work_of(rule) ─► passes forward, passes back        the same of a real stage 1 of 3, counted at its layer
"""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.building import Job, build_stage, plan_for
from dnipipe.check import one_batch
from dnipipe.config import load
from dnipipe.costs import work_of
from dnipipe.data import Task
from dnipipe.measuring import Work
from dnipipe.messages import Activation
from dnipipe.metrics import StageMetrics
from dnipipe.models import cross_entropy
from dnipipe.split import Plan
from dnipipe.stage import Stage
from tests.conftest import blobs

BATCHES, COUNTED = 20, 10
COMMON = "--pipeline.stages 3 --pipeline.boundaries 1,2 --pipeline.device cpu"


def job_of(words: str) -> Job:
    """Three stages of a layer each."""
    return Job(
        load(None, (*COMMON.split(), *words.split())),
        model=lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)),
        loss=cross_entropy,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3),
        task=lambda: Task(list(blobs(BATCHES)), None, 3, "blobs", None, None),
    )


def planned(job: Job, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Plan, list[Work]]:
    """Model and plan, and what was found to be the work of stages 0 and 1, whose edges are alike."""
    found: list[Work] = []

    def noted(*arguments: Any, **options: Any) -> Work:
        found.append(work_of(*arguments, **options))
        return found[-1]

    monkeypatch.setattr("dnipipe.building.work_of", noted)
    model, (x, y) = job.model(), next(blobs(1))
    return model, plan_for(job, model, x, y, 3), found


def passes(stage: Stage) -> Counter[str]:
    """Through the stage's layer, from now on."""
    seen: Counter[str] = Counter()

    def forward(layer: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> None:
        seen["forward"] += 1
        h.register_hook(lambda g: seen.update(["backward"]))

    next(stage.module.children()).register_forward_hook(forward)
    return seen


@pytest.mark.parametrize(
    ("words", "forwards", "backwards"),
    [
        ("--rule.name local", 1, 1),
        ("--rule.name synthetic", 1, 1),
        ("--rule.name synthetic --rule.warmup 5", 1, 1),  # for most of the run
        ("--rule.name synthetic --predictor.name linear --rule.bp_lambda 0.5", 2, 2),  # for the stage before
        ("--rule.name blend", 1, 2),  # its graph waits
        ("--rule.name blend --rule.stash false", 2, 2),
        ("--rule.name blend --wire.gradient_every 2", 1, 1.5),
        ("--rule.name blend --rule.stash false --wire.gradient_every 2", 1.5, 1.5),
        ("--rule.name delayed", 2, 1),
        ("--rule.name delayed --rule.stash true", 1, 1),
        ("--rule.name wait", 2, 1),
        ("--rule.name local --rule.then 9:blend", 1, 2),
    ],
)
def test_a_rule_costs_what_its_stage_is_seen_to_do(
    words: str, forwards: float, backwards: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(words)
    model, plan, (work,) = planned(job, monkeypatch)
    assert (work.forwards, work.backwards) == (forwards, backwards)
    stages = [build_stage(job, model, plan, k, BATCHES, StageMetrics(k, 3)) for k in range(3)]
    for batch, (x, y) in enumerate(blobs(BATCHES), start=1):
        if batch == BATCHES - COUNTED + 1:
            seen = passes(stages[1])
        one_batch(stages, Activation(batch, x, y))
    assert seen == {"forward": forwards * COUNTED, "backward": backwards * COUNTED}


def test_a_compiled_graph_cannot_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, (work,) = planned(job_of("--rule.name blend --pipeline.compile true"), monkeypatch)
    assert (work.forwards, work.backwards) == (2, 2)


def test_a_schedule_keeps_its_graph_and_has_no_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan, found = planned(job_of("--rule.name sync"), monkeypatch)
    assert found == [] and len(plan.seconds) == 3


def test_a_stages_seconds_are_those_of_its_passes_and_of_its_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    for module in ("measuring", "costs"):
        monkeypatch.setattr(f"dnipipe.{module}.lap", lambda like: float(next(clock)))
    _, plan, (work,) = planned(job_of("--rule.name blend"), monkeypatch)
    assert work == Work(1, 2, 1.0)  # whatever is timed takes a second
    assert plan.seconds == (1 + 2 + 1, 1 + 2 + 1, 1 + 1)


def test_an_edge_where_no_predictor_can_stand_is_planned_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cuts there is told by the stage; who does not need not know."""
    _, plan, found = planned(job_of("--rule.name synthetic --predictor.name conv"), monkeypatch)
    assert found == [] and plan.boundaries == (1, 2)


def test_measuring_leaves_the_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    job, (x, y) = job_of("--rule.name blend"), next(blobs(1))
    model, before = job.model(), torch.get_rng_state()
    plan_for(job, model, x, y, 3)
    assert torch.equal(torch.get_rng_state(), before)
