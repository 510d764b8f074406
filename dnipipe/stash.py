"""The weights with which a batch went through a stage, kept until its gradient comes (PipeDream, arXiv:1806.03377).

forward of n at θ ─► keep θ ─► …updates… ─► forward again at θ, backward ─► the gradient at θ, to be applied to θ' = now
"""

from __future__ import annotations

import torch.nn as nn


class Stash:
    """A copy of a module's parameters: as much memory as they take, for each batch under way."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()
        }

    def hand_over(self, module: nn.Module, compensate: float) -> None:
        """Add the gradients at θ to the module's: g + λ g² (θ' − θ), which for λ > 0 is a guess of that at θ'.

        DC-ASGD (Zheng et al. 2016, arXiv:1609.08326, eq. 10): the Hessian's diagonal, guessed by λ g².
        """
        for name, p in module.named_parameters():
            kept = self.weights[name]
            if kept.grad is None:
                continue
            g = kept.grad + compensate * kept.grad.square() * (p.detach() - kept.detach())
            p.grad = g if p.grad is None else p.grad + g


__all__ = ["Stash"]
