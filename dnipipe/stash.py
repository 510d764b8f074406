"""The weights with which a batch went through a stage, kept until its gradient comes (PipeDream, arXiv:1806.03377).

forward of n at θ ─► keep θ ─► …updates… ─► backward ─► the gradient at θ, to be applied to θ' = now

No update changes a copy, so the graph of a forward that used it can wait as well, and then no second forward is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call


class Stash:
    """A copy of a module's parameters: as much memory as they take, for each batch under way."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()
        }

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """The module's output for x (B, D...), with these weights and its own buffers, which it may change."""
        h: Tensor = functional_call(module, self.weights, (x,))
        return h

    def hand_over(self, module: nn.Module, compensate: float) -> None:
        """Move the gradients at θ to the module's: g + λ g² (θ' − θ), which for λ > 0 is a guess of that at θ'.

        DC-ASGD (Zheng et al. 2016, arXiv:1609.08326, eq. 10): the Hessian's diagonal, guessed by λ g².
        """
        for name, p in module.named_parameters():
            kept = self.weights[name]
            if kept.grad is None:
                continue
            g = kept.grad
            if compensate:
                g = g + compensate * g.square() * (p.detach() - kept.detach())
            p.grad = g if p.grad is None else p.grad + g
            kept.grad = None


class Graphs:
    """How many batches may wait with their graph: as many as fit into `limit` bytes.

    The others run their forward again. How much a graph takes is measured on the first, which is not kept.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.kept = 0
        self.size: int | None = None  # bytes of one

    @property
    def room(self) -> bool:
        return self.size is not None and (self.kept + 1) * self.size <= self.limit

    @contextmanager
    def measured(self, module: nn.Module) -> Iterator[None]:
        """Around the first forward: what it saves for its backward, each memory counted once, parameters not at all."""
        found = {p.untyped_storage().data_ptr(): 0 for p in module.parameters()}

        def note(tensor: Tensor) -> Tensor:
            memory = tensor.untyped_storage()
            found.setdefault(memory.data_ptr(), memory.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.size = sum(found.values())


__all__ = ["Graphs", "Stash"]
