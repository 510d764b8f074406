"""A stage's layers, and the passes through them that training takes.

forward   batch, x ──► h               at the weights of now, or on a copy of them under a graph that may wait
again     batch, x ──► h, later        with the same random numbers, no statistic counted twice, weights of now or then
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from dnipipe.randomness import reseed
from dnipipe.stash import Graphs, Stash


class Passes:
    """Args:
    module: the layers.
    seed: with the batch id and `first_layer`, decides every random number drawn in a pass.
    graphs: how many may be kept.
    """

    def __init__(self, module: nn.Module, seed: int, first_layer: int, graphs: Graphs) -> None:
        self.module, self.seed, self.first_layer, self.graphs = module, seed, first_layer, graphs
        self._writes: bool | None = None  # whether the first layer changes its input; None: not seen yet

    def mode(self, training: bool) -> None:
        if self.module.training != training:
            self.module.train(training)

    def forward(self, batch: int, x: Tensor, stash: Stash | None, held: Stash | None) -> Tensor:
        """If h's graph may wait, it is one on the `held` copy; else its size is noted the first time."""
        reseed(self.seed, self.first_layer, batch)
        if held:
            return self._into(partial(held.forward, self.module), x)
        with self.graphs.measured(self.module, x) if stash and self.graphs.size(x) is None else nullcontext():
            return self._into(self.module, x)

    def again(self, batch: int, x: Tensor, stash: Stash | None = None) -> Tensor:
        """The forward of a batch that waited: buffers (BatchNorm) as they are, and kept so."""
        self.mode(training=True)
        reseed(self.seed, self.first_layer, batch)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        weights = {**buffers, **(stash.weights if stash else {})}
        return self._into(lambda x: functional_call(self.module, weights, (x,)), x)

    def _into(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The module's output. Where it was seen to write into its input, as nn.ReLU(inplace=True) does, it is given a
        copy: x is a leaf of the graph, and still needed.
        """
        if self._writes is False:
            return module(x)
        given = x.clone()
        before = given._version  # counts what was written into a tensor
        h = module(given)
        self._writes = given._version != before
        return h


__all__ = ["Passes"]
