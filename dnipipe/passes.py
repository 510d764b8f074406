"""A stage's layers, and the passes through them that training takes.

forward   batch, x ──► h               at the weights of now, or on a copy of them under a graph that may wait
again     batch, x ──► h, later        with the same random numbers, no statistic counted twice, weights of now or then
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from dnipipe.pairs import Pair, first, joined, parted
from dnipipe.randomness import reseed
from dnipipe.stash import Graphs, Stash


class Passes:
    """Args:
    module: the layers.
    seed: with the batch id and `first_layer`, decides every random number drawn in a pass.
    graphs: how many may be kept.
    copies: whoever calls the module, give it a copy: it begins with a layer that writes into its input, which is a leaf
        of the graph, or somebody else's, and still needed.
    """

    def __init__(self, module: nn.Module, seed: int, first_layer: int, graphs: Graphs, copies: bool = False) -> None:
        self.module, self.seed, self.first_layer, self.graphs = module, seed, first_layer, graphs
        if copies:
            module.register_forward_pre_hook(_copied)

    def mode(self, training: bool) -> None:
        if self.module.training != training:
            self.module.train(training)

    def forward(
        self, batch: int, x: Tensor, along: Tensor | None, stash: Stash | None = None, held: Stash | None = None
    ) -> Pair:
        """If h's graph may wait, it is one on the `held` copy; else its size is noted the first time."""
        reseed(self.seed, self.first_layer, batch)
        given = joined(x, along)
        if held:
            return parted(functional_call(self.module, held.weights, (given,)))
        with self.graphs.measured(self.module, x) if stash and self.graphs.size(x) is None else nullcontext():
            return parted(self.module(given))

    def again(self, batch: int, x: Tensor, along: Tensor | None, stash: Stash | None = None) -> Tensor:
        """The forward of a batch that waited: buffers (BatchNorm) as they are, and kept so."""
        self.mode(training=True)
        reseed(self.seed, self.first_layer, batch)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        weights = {**buffers, **(stash.weights if stash else {})}
        return parted(functional_call(self.module, weights, (joined(x, along),)))[0]


def _copied(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (first(Tensor.clone, inputs[0]), *inputs[1:])


__all__ = ["Passes"]
