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


class Stash:
    """A copy of a module's parameters: as much memory as they take, for each batch under way."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()
        }

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
    """Which batches may wait with their graph: as many as fit into `limit` bytes. The others run their forward again.

    How much a graph takes is measured on the first batch, and again on any that is larger than all before; such a one
    is not kept, and a smaller one counts as the next larger that was measured.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.taken = 0  # bytes, by those that wait
        self.sizes: dict[int, int] = {}  # elements of x -> bytes of its graph

    def size(self, x: Tensor) -> int | None:
        """Bytes of its graph, at most; None: not known yet."""
        larger = [elements for elements in self.sizes if elements >= x.numel()]
        return self.sizes[min(larger)] if larger else None

    def room(self, x: Tensor) -> int:
        """Bytes that its graph would take; 0: it is not to be kept."""
        size = self.size(x)
        return size if size is not None and self.taken + size <= self.limit else 0

    @contextmanager
    def measured(self, module: nn.Module, x: Tensor) -> Iterator[None]:
        """Around a forward: what it saves for its backward, each memory counted once, parameters not at all."""
        found = {p.untyped_storage().data_ptr(): 0 for p in module.parameters()}

        def note(tensor: Tensor) -> Tensor:
            memory = tensor.untyped_storage()
            found.setdefault(memory.data_ptr(), memory.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.sizes[x.numel()] = max(1, sum(found.values()))


__all__ = ["Graphs", "Stash"]
