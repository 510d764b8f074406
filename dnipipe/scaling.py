"""Backward through layers in float16: small gradients are scaled up meanwhile, by as much as the gradient at hand asks.

    forward    x ──► down ──► [ layers in float16, weights ──► down ] ──► up ──► h
    backward   J^T g ◄── ÷ s ◄── [            s·g             ] ◄── × s ◄── g       s = 2^n: max |s·g| is 1/16 to 1/8

float16 knows nothing between 0 and 6e-8, and an element of a gradient of a mean loss is often smaller. Loss scaling
(Micikevicius et al. 2018, arXiv:1710.03740, section 3.2) multiplies the loss, by a number that is found by trial and
remembered from step to step. A stage's backward begins with a gradient that is known, so its scale is read off that:
nothing to find, to remember or to save, no step that is lost to a scale too large, and no number that the host has to
wait for. Powers of two, so that what is computed in float32 anyway does not change by a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from dnipipe.pairs import first

# of the largest element of a scaled gradient. float16 ends at 65504: that leaves room for sums over half a million of
# them, and what is a millionth of it is not lost yet
LARGEST_EXPONENT = -3  # it is under 2^-3, and not under half of that
FURTHEST = 100  # n, at most, either way: float32 ends at 2^128


class _Scale:
    """s, of the backward that is under way (0-dim)."""

    value: Tensor


class _Same(torch.autograd.Function):
    """Its input as it is; what becomes of a gradient is the subclasses' business."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: _Scale) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)


class _Up(_Same):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        by = (LARGEST_EXPONENT - torch.frexp(g.abs().amax()).exponent).clamp(-FURTHEST, FURTHEST)
        ctx.scale.value = torch.ldexp(torch.ones_like(by, dtype=g.dtype), by)
        return g * ctx.scale.value, None


class _Down(_Same):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g / ctx.scale.value, None


def _down(x: Tensor, scale: _Scale) -> Tensor:
    down: Tensor = _Down.apply(x, scale) if x.requires_grad else x  # type: ignore[no-untyped-call]
    return down


class _Plain(nn.Module):
    """A module as functional_call can run it: by `run`, its forward, with other tensors as its weights."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *arguments: Any) -> Any:
        return self.run(*arguments)


def scaled(module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, the module's forward, such that a gradient of what it returns goes back through it scaled.

    It may go back twice; each time begins with its own scale. A gradient of a gradient is refused by autograd. Weights
    that functional_call has put in the place of the module's are the ones that get the gradient.
    """
    plain = _Plain(module, run)

    def forward(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*arguments)
        scale = _Scale()
        weights = {f"module.{name}": _down(p, scale) for name, p in module.named_parameters()}
        given = tuple(first(lambda x: _down(x, scale), each) for each in arguments)
        out = functional_call(plain, weights, given)
        return first(lambda h: _Up.apply(h, scale), out)  # type: ignore[no-untyped-call]

    return forward


__all__ = ["scaled"]
