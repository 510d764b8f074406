"""A model into stages: where to cut, what each edge carries, and the checks that belong before anything starts.

    layers     0   1   2   3   4   5   6   7        children of the nn.Sequential
    boundaries         2       4           7        first layer of each stage after the first
    stages    [0   1] [2   3] [4   5   6] [7]

A plan is plain values: stage 0 makes it and publishes it as JSON, so that no two processes measure differently.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch.nn as nn
from torch import Tensor

from dnipipe.errors import SplitError
from dnipipe.measuring import Costs, Work, measure
from dnipipe.pairs import Given, parted
from dnipipe.predictors import Edge

LEAST, WORTH = 0.25, 1.1  # of balance
INFINITE = float("inf")

Like = tuple[str, tuple[int, ...]]  # a tensor's dtype, by name, and shape
Cost = Callable[[range, bool], float]  # (layers of a stage, whether it is the last one) -> seconds of a batch, or inf


@dataclass(frozen=True)
class Plan:
    """Where the model is cut and what flows there, for one batch like the first."""

    layers: tuple[str, ...]  # names of the model's children, in order
    boundaries: tuple[int, ...]  # first layer of each stage after the first
    seconds: tuple[float, ...]  # of a batch in each stage, measured: its layers and its predictor, one after the other
    parameters: tuple[int, ...]  # of each layer
    shapes: tuple[tuple[int, ...], ...]  # output of each layer, B first
    dtypes: tuple[str, ...]  # of that output
    x: tuple[int, ...]  # shape of the model's input
    x_dtype: str
    y: tuple[int, ...]  # shape of the labels
    classes: int | None  # labels are whole numbers in [0, classes)
    writes: tuple[bool, ...] = ()  # whether each layer writes into its input, as nn.ReLU(inplace=True) does
    alongs: tuple[Like | None, ...] = ()  # what each layer gives beside its output (pairs.py)
    x_along: Like | None = None  # and what the data have beside x
    predicting: tuple[float, ...] = ()  # of the seconds, those of each stage's predictor

    @property
    def stages(self) -> int:
        return len(self.boundaries) + 1

    def layers_of(self, stage: int) -> range:
        """The layers of one stage."""
        edges = (0, *self.boundaries, len(self.layers))
        return range(edges[stage], edges[stage + 1])

    def h(self, stage: int) -> Like:
        """(dtype, shape) of the stage's output."""
        last = self.layers_of(stage)[-1]
        return self.dtypes[last], self.shapes[last]

    def along(self, stage: int) -> Like | None:
        """The same of what travels with it, if anything does."""
        return self.alongs[self.layers_of(stage)[-1]] if self.alongs else None

    def input(self, stage: int) -> tuple[Like, Like | None]:
        """What the stage's layers take: the network's input, or what the stage before gives."""
        return (self.h(stage - 1), self.along(stage - 1)) if stage else ((self.x_dtype, self.x), self.x_along)

    def edge(self, stage: int) -> Edge:
        """What the predictor of this stage must know. Stage K-1 has none."""
        return Edge(self.shapes[self.layers_of(stage)[-1]], self.y, self.shapes[-1], self.classes)

    def copies(self, stage: int) -> bool:
        """Whether the stage has to be given a copy of its input, which is still needed."""
        return bool(self.writes) and self.writes[self.layers_of(stage)[0]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        values: dict[str, Any] = json.loads(text)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        values["shapes"] = tuple(tuple(shape) for shape in values["shapes"])
        *alongs, x_along = (
            like and (like[0], tuple(like[1])) for like in (*values.get("alongs", ()), values.get("x_along"))
        )
        return cls(**{**values, "alongs": tuple(alongs), "x_along": x_along})


def plan(
    model: nn.Module,
    stages: int,
    boundaries: Sequence[int],
    x: Given,
    y: Tensor,
    classes: int | None,
    device: str = "cpu",
    by_time: bool = True,
    prepare: Callable[[nn.Module], nn.Module] = lambda layer: layer,
    work: Callable[[Edge], Work] = lambda edge: Work(),
) -> Plan:
    """Measure the layers on one batch (x, y), cut into `stages` (at `boundaries`, or balanced), and check the cut.

    Balanced by measured time, or if not `by_time` by the number of parameters, which is the same in every run.
    `prepare` makes a layer, in place, run as it will in a stage. `work`: what is done in a stage that ends at such an
    edge; asked once for edges that are alike.

    The model is left as it was: what is measured is a copy, and torch's random state is put back.
    Raises SplitError: not an nn.Sequential, more stages than layers, a stage without parameters to train, a parameter
    that two stages share.
    """
    if not isinstance(model, nn.Sequential):
        raise SplitError(
            f"the model is a {type(model).__name__}, and only an nn.Sequential can be cut between its children: "
            "wrap its parts as nn.Sequential(first, second, ...)"
        )
    layers = [name for name, _ in places(model)]
    if stages > len(layers):
        raise SplitError(f"{stages} stages, but the model has only {len(layers)} layers: use at most that many stages")
    h, along = parted(x)
    forwards, backwards, pairs, writes = measure(places(model), x, device, prepare)
    outputs = [h for h, _ in pairs]
    costs = Costs(forwards, backwards, outputs, y, classes, functools.cache(work))
    trainable = [any(p.requires_grad for p in layer.parameters()) for layer in model]
    parameters = [sum(p.numel() for p in layer.parameters()) for layer in model]
    cost: Cost = costs.of if by_time else lambda layers, last: float(sum(parameters[layer] for layer in layers))
    made = Plan(
        layers=tuple(layers),
        boundaries=tuple(boundaries) or balance(cost, trainable, stages, costs.own if by_time else None),
        seconds=(),
        parameters=tuple(parameters),
        shapes=tuple(tuple(h.shape) for h in costs.outputs),
        dtypes=tuple(_name(h) for h in costs.outputs),
        x=tuple(h.shape),
        x_dtype=_name(h),
        y=tuple(y.shape),
        classes=costs.classes,
        writes=tuple(writes),
        alongs=tuple(_like(along) for _, along in pairs),
        x_along=_like(along),
    )
    _check(model, made, trainable)
    parts = [(made.layers_of(k), k == stages - 1) for k in range(stages)]
    return replace(
        made,
        seconds=tuple(costs.of(*part) for part in parts),
        predicting=tuple(costs.work_of(*part).seconds for part in parts),
    )


def _like(tensor: Tensor | None) -> Like | None:
    return None if tensor is None else (_name(tensor), tuple(tensor.shape))


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def balance(cost: Cost, trainable: Sequence[bool], stages: int, work: Cost | None = None) -> tuple[int, ...]:
    """Boundaries that make the most costly stage as cheap as possible, each stage having something to train.

    cost: of a stage of these layers, and whether it is the last one. work: the part of it that is its layers' own. A
    stage with next to none of that does little but predict, and learns badly (an embedding by itself:
    learning-measured.md); so none has less than a quarter of an equal share, if that makes the most costly one dearer
    by a tenth at most.
    """
    cut, most = _cheapest(cost, trainable, stages)
    if cut is None:
        raise SplitError(
            f"{stages} stages, but only {sum(trainable)} layers have parameters to train, and each stage needs one: "
            f"use at most {sum(trainable)} stages"
        )
    if work is None:
        return cut
    least = LEAST * work(range(len(trainable)), True) / stages
    fuller, dearer = _cheapest(
        lambda layers, last: cost(layers, last) if work(layers, last) >= least else INFINITE, trainable, stages
    )
    return fuller if fuller is not None and dearer <= WORTH * most else cut


def _cheapest(cost: Cost, trainable: Sequence[bool], stages: int) -> tuple[tuple[int, ...] | None, float]:
    """(boundaries, the cost of the most costly stage); None if there are none of finite cost.

    Exact, by dynamic programming over (stages, layers): O(K n²) stages are looked at.
    """
    n = len(trainable)
    # best[k][j]: the most costly of k stages made of the first j layers; back[k][j]: where the k-th of them starts
    best = [[INFINITE] * (n + 1) for _ in range(stages + 1)]
    back = [[0] * (n + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for k in range(1, stages + 1):
        for j in range(k, n + 1):
            for i in range(k - 1, j):
                if not any(trainable[i:j]) or best[k - 1][i] == INFINITE:
                    continue
                most = max(best[k - 1][i], cost(range(i, j), k == stages))
                if most < best[k][j]:
                    best[k][j], back[k][j] = most, i
    cut, j = [], n
    for k in range(stages, 1, -1):
        j = back[k][j]
        cut.append(j)
    return (None if best[stages][n] == INFINITE else tuple(reversed(cut))), best[stages][n]


def part(model: nn.Module, made: Plan, stage: int) -> nn.Sequential:
    """One stage as a module whose parameters keep the whole model's names."""
    children = places(model)
    return nn.Sequential(OrderedDict(children[layer] for layer in made.layers_of(stage)))


def places(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of all that an nn.Sequential calls, in order. One layer may stand in several places, as a ReLU that
    is used throughout; named_children would leave out all but the first.
    """
    return [(name, each) for name, each in model.named_modules(remove_duplicate=False) if name and "." not in name]


def _check(model: nn.Sequential, made: Plan, trainable: Sequence[bool]) -> None:
    edges = (0, *made.boundaries, len(made.layers))
    if made.alongs[-1]:
        raise SplitError(f"the model's last layer, {made.layers[-1]}, returns a pair: its output is one tensor")
    if any(left >= right for left, right in pairwise(edges)):
        raise SplitError(
            f"boundaries {list(made.boundaries)} do not rise from 1 to {len(made.layers) - 1}: each names the first "
            f"layer of a stage, and the model has {len(made.layers)} layers"
        )
    owner: dict[int, tuple[int, str]] = {}
    for stage in range(made.stages):
        layers = made.layers_of(stage)
        if not any(trainable[layer] for layer in layers):
            raise SplitError(
                f"stage {stage} (layers {layers.start} to {layers.stop - 1}) has no parameter to train: "
                "move the boundary so that it has"
            )
        for name, parameter in part(model, made, stage).named_parameters(remove_duplicate=False):
            first = owner.setdefault(id(parameter), (stage, name))
            if first[0] != stage:
                raise SplitError(
                    f"stages {first[0]} and {stage} share a parameter ({first[1]} is {name}): put both layers into one "
                    "stage, or untie them"
                )


__all__ = ["Plan", "balance", "part", "places", "plan"]
