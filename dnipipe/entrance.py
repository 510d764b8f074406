"""A module that writes into its input, as nn.ReLU(inplace=True) does where a stage begins with it.

x, a leaf of the graph ──► copy ──► module       x is still needed: for its gradient, and where the forward is run again
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Entrance:
    """Calls a module with x itself, or, if it has been seen to write into what it was given, with a copy."""

    def __init__(self) -> None:
        self.written: bool | None = None  # None: not called yet

    def __call__(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The module's output for x (B, D...)."""
        if self.written is False:
            return module(x)
        given = x.clone()
        before = given._version  # counts what was written into a tensor
        h = module(given)
        self.written = given._version != before
        return h


__all__ = ["Entrance"]
