"""A batch that a stage has sent on and that lacks its gradient, and what of it the gradient is of when it comes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dnipipe.stash import Stash


@dataclass(frozen=True, eq=False)
class Pending:
    """A batch that lacks its gradient: data, and a graph only on weights that nothing changes."""

    x: Tensor | None  # the input (B, D...), if a backward is still to come
    along: Tensor | None  # what came with x (pairs.py), as long as x is kept
    h: Tensor  # the output (B, D...), detached
    y: Tensor
    predicted: Tensor | None  # ĝ, if the rule made one
    back: Tensor | None  # J^T ĝ, like x, if the stage before is sent it with what will mend it
    updated: bool  # the stage has already stepped on this batch
    skipped: bool  # and this one never will
    answered: bool  # the stage before already has its Gradient
    updates: int  # how many updates the stage had made when it sent h
    stash: Stash | None  # the weights with which it went through, if the rule wants its gradient there
    graph: Tensor | None  # h again, with its graph on those weights and x; None: the forward will be run again
    taken: int  # bytes, by the graph

    @property
    def kept(self) -> int:
        """Bytes that wait with it, besides the graph's."""
        weights = self.stash.weights.values() if self.stash else ()
        own = (self.x, self.along, self.h, self.y, self.predicted, self.back)
        return sum(tensor.nbytes for tensor in (*own, *weights) if tensor is not None)


@dataclass(frozen=True, eq=False)
class Target:
    """What a gradient is of: a batch, or some of its samples as if they were one."""

    h: Tensor  # (n, D...)
    y: Tensor
    predicted: Tensor | None  # ĝ (n, D...), of the mean loss over these n

    @classmethod
    def of(cls, pending: Pending, samples: Tensor | None) -> Target | None:
        """None: the batch has no such samples."""
        h, y, predicted = pending.h, pending.y, pending.predicted
        if samples is None:
            return cls(h, y, predicted)
        whole = h.shape[0]
        if samples.dtype != torch.int64 or samples.dim() != 1 or not 0 < len(samples) <= whole:
            return None
        if int(samples.min()) < 0 or int(samples.max()) >= whole:
            return None
        at = samples.to(h.device)
        part = None if predicted is None else predicted[at] * (whole / len(samples))
        return cls(h[at], y[at], part)
