"""What a layer takes and gives, and a network's input: one tensor, or a pair of which only the first learns.

h            (B, D...)
(h, along)   and (B, ...) what layers further down need beside it, e.g. which tokens are padding: it has no gradient, no
             predictor sees it, and it travels with h as it is
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

from torch import Tensor

Pair = tuple[Tensor, "Tensor | None"]  # (h, along); None: h alone
Given = Union[Tensor, tuple[Tensor, Tensor]]  # as layers have it


def joined(h: Tensor, along: Tensor | None) -> Given:
    """As a layer takes it."""
    return h if along is None else (h, along)


def parted(given: Any) -> Pair:
    """What a layer takes or gives, in two. Raises TypeError if it is neither a tensor nor a pair."""
    if isinstance(given, Tensor):
        return given, None
    if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(each, Tensor) for each in given)):
        what = f"tuple of {len(given)}" if isinstance(given, tuple) else type(given).__name__
        raise TypeError(
            f"it returns a {what}, and an edge carries one tensor, or a pair of them whose second needs no gradient"
        )
    h, along = given
    if along.requires_grad:
        raise TypeError("the second of the pair that it returns needs a gradient, and only the first may: detach it")
    if along.shape[:1] != h.shape[:1]:
        shapes = f"{tuple(h.shape)} and {tuple(along.shape)}"
        raise TypeError(f"of the pair that it returns, {shapes}, each must have the batch's samples first")
    return h, along


def first(change: Callable[[Tensor], Tensor], given: Any) -> Given:
    """The same with its first tensor changed."""
    h, along = parted(given)
    return joined(change(h), along)


__all__ = ["Given", "Pair", "first", "joined", "parted"]
