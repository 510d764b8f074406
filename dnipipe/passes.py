"""A stage's layers, and the passes through them that training takes.

forward   batch, x ──► h               at the weights of now, or on a copy of them under a graph that may wait
again     batch, x ──► h, later        with the same random numbers, no statistic counted twice, weights of now or then
"""

from __future__ import annotations

from contextlib import nullcontext

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
        _Entrance(module)

    def mode(self, training: bool) -> None:
        if self.module.training != training:
            self.module.train(training)

    def forward(self, batch: int, x: Tensor, stash: Stash | None, held: Stash | None) -> Tensor:
        """If h's graph may wait, it is one on the `held` copy; else its size is noted the first time."""
        reseed(self.seed, self.first_layer, batch)
        if held:
            return held.forward(self.module, x)
        with self.graphs.measured(self.module, x) if stash and self.graphs.size(x) is None else nullcontext():
            h: Tensor = self.module(x)
        return h

    def again(self, batch: int, x: Tensor, stash: Stash | None = None) -> Tensor:
        """The forward of a batch that waited: buffers (BatchNorm) as they are, and kept so."""
        self.mode(training=True)
        reseed(self.seed, self.first_layer, batch)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        weights = {**buffers, **(stash.weights if stash else {})}
        h: Tensor = functional_call(self.module, weights, (x,))
        return h


class _Entrance:
    """Gives a module that writes into its input, as nn.ReLU(inplace=True) does where a stage begins with it, a copy:
    x is a leaf of the graph, or somebody else's, and still needed. The first call tells whether it writes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.writes: bool | None = None
        self.before = 0  # how often what was given had been written into
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.writes is False:
            return None
        given = inputs[0].clone()
        self.before = given._version
        return (given, *inputs[1:])

    def _leave(self, module: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> None:
        if self.writes is None:
            self.writes = inputs[0]._version != self.before


__all__ = ["Passes"]
