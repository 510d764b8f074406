"""What guesses a stage's input is saved by the layer that the stage begins with, and found by it under another cut.

layers       0   1   2   3   4
5 stages     0 │ 1 │ 2 │ 3 │ 4        saved: the models of the inputs of 1, 2, 3 and 4
3 stages     0 │ 1   2 │ 3   4        taken up: those of 1 and 3
2 stages     0   1 │ 2   3   4        that of 2
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.building import inputs_of
from dnipipe.config import build
from dnipipe.errors import CheckpointError
from dnipipe.gradient_rules import Synthetic
from dnipipe.inputs import Inputs
from dnipipe.learner import Learner
from dnipipe.predictors import VFBN
from dnipipe.split import Plan, plan
from dnipipe.state import first_of, load_state, state_of
from dnipipe.unlocked import UnlockedStage
from tests.conftest import Line, blobs, make_stages
from tests.test_stage import SGD, one_at_a_time
from tests.test_unlocked import copied, unchanged


def cut(stages: int) -> Plan:
    net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))
    return plan(net, stages, {5: (1, 2, 3, 4), 3: (1, 3), 2: (2,)}[stages], *next(blobs(1)), 3)


def of_plan(planned: Plan, seed: int) -> list[UnlockedStage]:
    torch.manual_seed(seed)
    models = [Inputs(nn.Linear(8, 12), (16, 8), "float32", 0, 1e-2) if k else None for k in range(planned.stages)]
    modules: list[nn.Module] = []
    for k in range(planned.stages):
        children = {
            planned.layers[i]: nn.Linear(8 if i == 0 else 12, 3 if i == 4 else 12) for i in planned.layers_of(k)
        }
        modules.append(nn.Sequential())
        for name, child in children.items():
            modules[-1].add_module(name, child)
    kind: Any = lambda k: partial(UnlockedStage, models[k])  # noqa: E731
    heads = [VFBN(nn.Linear(12, 3), F.cross_entropy, 0.1) for _ in modules]
    made = make_stages(modules, lambda k: Synthetic(Learner(heads[k], 1e-3)), SGD, kind=kind)
    return [stage for stage in made if isinstance(stage, UnlockedStage)]


def moments(stage: UnlockedStage) -> list[Tensor]:
    assert stage.inputs is not None
    return [tensor for state in stage.inputs.optimizer.state.values() for tensor in state.values()]


@pytest.mark.parametrize("stages", [5, 3, 2])
def test_a_model_of_the_input_comes_back_where_a_stage_begins_with_the_same_layer(tmp_path: Path, stages: int) -> None:
    before, old = of_plan(cut(5), seed=0), cut(5)
    one_at_a_time(Line(before), 4)
    for k, stage in enumerate(before):
        checkpoint.save_part(tmp_path, 4, k, state_of(stage, old))
    checkpoint.complete(tmp_path, 4, 5, {}, keep=1)
    planned = cut(stages)
    for stage in of_plan(planned, seed=1):
        first = first_of(stage, planned)
        state = checkpoint.newest(tmp_path).state_for(stage.module.state_dict(), "", first)
        load_state(stage, state)
        if stage.inputs:
            same_layer = before[int(first)]
            assert same_layer.inputs is not None
            assert unchanged(stage.inputs.net, copied(same_layer.inputs.net))
            assert len(moments(stage)) == 6
            assert all(torch.equal(a, b) for a, b in zip(moments(stage), moments(same_layer), strict=True))
        else:
            assert state.inputs == state.inputs_optimizer == {}


def test_a_checkpoint_without_one_leaves_a_fresh_one_and_another_kind_is_refused() -> None:
    stage, planned = of_plan(cut(3), seed=0)[1], cut(3)
    state = state_of(stage, planned)
    assert set(state.inputs) == {"1.weight", "1.bias"} and stage.inputs is not None
    other = of_plan(cut(3), seed=1)[1]
    assert other.inputs is not None
    fresh = copied(other.inputs.net)
    load_state(other, checkpoint.StageState(**{**vars(state), "inputs": {}, "inputs_optimizer": {}}))
    assert unchanged(other.inputs.net, fresh)
    with pytest.raises(CheckpointError, match="the model of the input of 1 is of another kind than the settings say"):
        load_state(other, checkpoint.StageState(**{**vars(state), "inputs": {"1.bias": torch.ones(1)}}))


def test_what_it_starts_with_depends_on_the_seed_and_the_layer_alone() -> None:
    def weights(seed: int, stages: int, k: int, before: int) -> list[Tensor]:
        torch.manual_seed(before)
        made = inputs_of(build({"train": {"seed": seed}}), cut(stages), k)
        assert made is not None
        return copied(made.net)

    one = weights(0, 5, 3, before=1)
    for other, alike in (
        (weights(0, 3, 2, before=2), True),  # begins with layer 3, too
        (weights(0, 5, 2, before=1), False),
        (weights(1, 5, 3, before=1), False),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) is alike
    assert inputs_of(build({}), cut(5), 0) is None
