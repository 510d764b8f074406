"""Where a model is cut, and what is refused before anything starts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.errors import SplitError
from dnipipe.measuring import Work
from dnipipe.predictors import Edge
from dnipipe.split import Plan, balance, part, plan

X, Y = torch.randn(6, 8), torch.randint(3, (6,))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))


def adding(seconds: list[float]) -> Callable[[range, bool], float]:
    """What layers cost when each costs the same in any stage."""
    return lambda layers, last: sum(seconds[layer] for layer in layers)


@pytest.mark.parametrize(
    ("seconds", "stages", "expected"),
    [
        #  the slowest stage as fast as can be
        ([1, 1, 1, 1], 2, (2,)),
        ([4, 1, 1, 1, 1], 2, (1,)),
        ([1, 1, 1, 1, 4], 2, (4,)),
        ([1, 5, 1, 5, 1, 5], 3, (2, 4)),
        ([2, 2, 2], 3, (1, 2)),
        ([3], 1, ()),
    ],
)
def test_balance(seconds: list[float], stages: int, expected: tuple[int, ...]) -> None:
    cut = balance(adding(seconds), [True] * len(seconds), stages)
    edges = (0, *cut, len(seconds))
    wanted = (0, *expected, len(seconds))
    slowest = max(sum(seconds[a:b]) for a, b in pairwise(edges))
    assert slowest == max(sum(seconds[a:b]) for a, b in pairwise(wanted))
    assert len(cut) == stages - 1


def test_balance_gives_each_stage_something_to_train() -> None:
    assert balance(adding([9, 0.1, 0.1, 9]), [True, False, False, True], 2) in ((1,), (2,), (3,))
    assert balance(adding([1, 9, 9, 1]), [True, False, True, False], 2) == (2,)
    with pytest.raises(SplitError, match="3 stages, but only 2 layers have parameters"):
        balance(adding([1, 1, 1]), [True, False, True], 3)


def test_stages_before_the_last_count_what_their_rule_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])  # each 1 s forward, 2 s back
    monkeypatch.setattr("dnipipe.split.measure", lambda *_: ([1.0] * 8, [2.0] * 8, [(X, None)] * 8, [False] * 8))

    def planned(work: Work) -> Plan:
        return plan(net, 2, (), X, Y, 8, work=lambda edge: work)

    assert planned(Work()).boundaries == (4,) and planned(Work()).seconds == (12, 12)
    assert planned(Work(backwards=2)).boundaries == (3,) and planned(Work(backwards=2)).seconds == (15, 15)
    assert planned(Work(forwards=2)).seconds == (12, 15)
    assert planned(Work(seconds=6.0)).boundaries == (3,) and planned(Work(seconds=6.0)).seconds == (15, 15)
    assert planned(Work(seconds=6.0)).predicting == (6, 0)
    asked: list[Edge] = []
    plan(net, 3, (), X, Y, 8, work=lambda edge: asked.append(edge) or Work())
    assert asked == [Edge((6, 8), (6,), (6, 8), 8)]  # once, for all edges are alike


@pytest.mark.parametrize(
    ("dearer", "expected"),
    [
        (1.09, (2, 3)),  # a stage that has next to no layers is avoided
        (1.11, (1, 2)),  # but not at any price
    ],
)
def test_no_stage_has_next_to_no_layers_if_that_costs_a_tenth_at_most(dearer: float, expected: tuple[int, ...]) -> None:
    own = [0.1, 1.0, 1.0, 1.0]  # an embedding and three blocks

    def cost(layers: range, last: bool) -> float:
        return {range(0, 1): 0.5, range(0, 2): dearer}.get(layers, 0.5 * len(layers) if last else 1.0)

    assert balance(cost, [True] * 4, 3) == (1, 2)
    assert balance(cost, [True] * 4, 3, lambda layers, last: sum(own[layer] for layer in layers)) == expected


def test_a_plan_describes_every_edge_and_survives_json() -> None:
    made = plan(model(), 3, [2, 4], X, Y, 3)
    assert [list(made.layers_of(k)) for k in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert made.edge(0).h == (6, 8) and made.edge(1).h == (6, 4) and made.edge(1).output == (6, 3)
    assert made.parameters == (72, 16, 0, 36, 0, 15)
    assert Plan.from_json(made.to_json()) == made


def test_planning_leaves_the_model_and_the_random_state_alone() -> None:
    torch.manual_seed(0)
    net = model()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    plan(net, 2, (), X, Y, 3)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_parts_keep_the_models_names() -> None:
    net = nn.Sequential(OrderedDict(stem=nn.Linear(8, 8), body=nn.Sequential(nn.Linear(8, 4)), head=nn.Linear(4, 3)))
    made = plan(net, 3, (), X, Y, 3)
    names = [name for k in range(3) for name in part(net, made, k).state_dict()]
    assert names == list(net.state_dict())


def tied() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    return net


class Gives(nn.Module):
    """What `made` makes of its input."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(x)


@pytest.mark.parametrize(
    ("net", "stages", "boundaries", "message"),
    [
        (nn.Linear(8, 3), 2, (), "the model is a Linear, and only an nn.Sequential"),
        (model(), 7, (), "7 stages, but the model has only 6 layers"),
        (model(), 5, (), "5 stages, but only 4 layers have parameters to train"),
        (model(), 3, (2, 3), r"stage 1 \(layers 2 to 2\) has no parameter to train"),
        (model(), 3, (3, 2), "boundaries .3, 2. do not rise"),
        (model(), 2, (6,), "boundaries .6. do not rise from 1 to 5"),
        (tied(), 2, (), r"stages 0 and 1 share a parameter \(0.weight is 2.weight\)"),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(5, 3)), 2, (), r"layer 1 cannot take the output \(6, 8\)"),
        (nn.Sequential(nn.Linear(8, 8), Gives(lambda x: (x, x, x)), nn.Linear(8, 3)), 2, (), "1 .* a tuple of 3, and"),
        (nn.Sequential(nn.Linear(8, 8), Gives(lambda x: [x, x]), nn.Linear(8, 3)), 2, (), "layer 1 .* returns a list"),
        (nn.Sequential(nn.Linear(8, 8), Gives(lambda x: (x, None)), nn.Linear(8, 3)), 2, (), "layer 1 .* a tuple of 2"),
        (nn.Sequential(nn.Linear(8, 8), Gives(lambda x: (x, x)), nn.Linear(8, 3)), 2, (), "second .* detach it"),
        (nn.Sequential(nn.Linear(8, 8), Gives(lambda x: (x, x[0] > 0)), nn.Linear(8, 3)), 2, (), "the batch's samples"),
        (
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3), Gives(lambda x: (x, x > 0))),
            2,
            (1,),
            "last layer, 2, .* pair",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(net: nn.Module, stages: int, boundaries: tuple[int, ...], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        plan(net, stages, boundaries, X, Y, 3)


def test_a_cut_by_parameters_does_not_depend_on_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 2))
    x, y = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    for slow, by_time in enumerate((1, 2, 2, 3)):
        times = [1.0 + 99.0 * (layer == slow) for layer in range(4)]
        measured = times, [0.0] * 4, [(torch.zeros(2, 2), None)] * 4, [False] * 4
        monkeypatch.setattr("dnipipe.split.measure", lambda *_, measured=measured: measured)
        assert plan(model, 2, (), x, y, 2).boundaries == (by_time,)
        assert plan(model, 2, (), x, y, 2, by_time=False).boundaries == (2,)  # 320 + 4,160 and 520 + 18


def test_a_layer_that_writes_into_its_input_is_known_and_a_stage_that_begins_with_it() -> None:
    x, y = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    act = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))
    made = plan(
        nn.Sequential(nn.Linear(8, 8), act, nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))), 2, (1,), x, y, 8
    )
    assert made.writes == (False, True, False) and [made.copies(k) for k in (0, 1)] == [False, True]
    assert Plan.from_json(made.to_json()) == made
