"""What a batch costs each layer, and so any stage that may be cut out of them.

layers, one batch ─► measure: each one's seconds forward and back ─┐
edge ─► work: what a stage that ends there does besides            ─┴─► Costs: seconds of a batch in a stage
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.errors import SplitError
from dnipipe.labels import class_axis
from dnipipe.pairs import Given, Pair, joined, parted
from dnipipe.predictors import Edge

REPEATS = 6  # measurements of a layer


@dataclass(frozen=True)
class Work:
    """What a batch, on average, is to a stage before the last one: passes through its layers, its predictor's seconds.

    The last stage has the loss: one pass forward, one back, and no predictor.
    """

    forwards: float = 1
    backwards: float = 1
    seconds: float = 0.0


class Costs:
    """Seconds of a batch in any stage that may be cut out. forwards, backwards, outputs: of each layer."""

    def __init__(
        self,
        forwards: list[float],
        backwards: list[float],
        outputs: list[Tensor],
        y: Tensor,
        classes: int | None,
        work: Callable[[Edge], Work],
    ) -> None:
        self.forwards, self.backwards, self.outputs, self.work = forwards, backwards, outputs, work
        self.shapes, self.y = [tuple(h.shape) for h in outputs], tuple(y.shape)
        axis = None if y.is_floating_point() else class_axis(self.shapes[-1], self.y)
        self.classes = self.shapes[-1][axis] if classes is None and axis is not None else classes

    def work_of(self, layers: range, last: bool) -> Work:
        return Work() if last else self.work(Edge(self.shapes[layers[-1]], self.y, self.shapes[-1], self.classes))

    def of(self, layers: range, last: bool) -> float:
        work = self.work_of(layers, last)
        there, back = (sum(seconds[layer] for layer in layers) for seconds in (self.forwards, self.backwards))
        return work.forwards * there + work.backwards * back + work.seconds

    def own(self, layers: range, last: bool) -> float:
        """Once forward and back, whatever the rule: what there is of layers."""
        return sum(self.forwards[layer] + self.backwards[layer] for layer in layers)


def measure(
    layers: Sequence[tuple[str, nn.Module]], x: Given, device: str, prepare: Callable[[nn.Module], nn.Module]
) -> tuple[list[float], list[float], list[Pair], list[bool]]:
    """Of each layer on one batch: seconds of its forward and of its backward, the least disturbed of some; its output;
    whether it writes into its input."""
    forwards, backwards, outputs, writes = [], [], [], []
    with torch.random.fork_rng():
        x, along = parted(x)
        h: Pair = x.to(device), None if along is None else along.to(device)
        for name, layer in layers:
            twin = prepare(copy.deepcopy(layer).to(device).train())
            try:
                runs = [_seconds(twin, h) for _ in range(REPEATS)]
            except Exception as error:
                raise SplitError(
                    f"layer {name} cannot take the output {tuple(h[0].shape)} of the layers before it: {error}"
                ) from error
            forwards.append(min(run[0] for run in runs))  # the first ones warm up, others may be interrupted
            backwards.append(min(run[1] for run in runs))
            h = runs[-1][2]
            outputs.append(h)
            writes.append(runs[-1][3])
    return forwards, backwards, outputs, writes


def _seconds(layer: nn.Module, pair: Pair) -> tuple[float, float, Pair, bool]:
    x, along = pair[0].detach(), pair[1]
    if x.is_floating_point():
        x.requires_grad_()
    given = x.clone()  # a layer may write into its input, which its version counts
    before = given._version
    started = lap(x)
    h, along = parted(layer(joined(given, along)))
    turned = lap(x)
    if h.requires_grad:
        h.backward(torch.ones_like(h))  # type: ignore[no-untyped-call]
    return turned - started, lap(x) - turned, (h.detach(), along), given._version != before


def lap(like: Tensor) -> float:
    """Seconds this process has worked by now; on a GPU, such a tensor's, the time when all it was given is done."""
    if like.is_cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()  # the other stages' processes start at this moment


__all__ = ["REPEATS", "Costs", "Work", "lap", "measure"]
