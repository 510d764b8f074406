"""What an arriving gradient teaches a predictor: how far off its guess was, and how often that is gone over.

(h, y, g) ─► Replay: it, and the `size` newest before it, the older the less     `steps` times
                      │
                      ▼
             Distance: (1/N) Σ ‖N·ĝ − N·g‖² / s²  +  c · (1/N) Σ (1 − cos(ĝ, g))       sums over the N loss terms

s² is 1, or a running mean of (1/N) Σ ‖N·g‖²: then an error of 1 is as large as what arrives, whatever the task, and no
weight has to be found again as gradients shrink. The first term is the paper's L2 loss (arXiv:1608.05343, section 2).
"""

from __future__ import annotations

from collections import deque

import torch
import torch.nn as nn
from torch import Tensor

MEMORY = 64  # gradients that the running size goes back, about


def rows(terms: Tensor, y: Tensor) -> Tensor:
    """(N, features of a loss term) out of N·g (B, D...): a row a label that h has a place for, or a sample."""
    per_label = not y.is_floating_point() and terms.shape[: y.dim()] == y.shape
    return terms.reshape(y.numel() if per_label else y.shape[0], -1)


class Distance(nn.Module):
    """Between N·ĝ and N·g, both as rows (N, features of a loss term), per loss term.

    Args:
        normalise: measure it by the running size s of what arrives.
        cosine: c, weight of the second term.
    """

    def __init__(self, normalise: bool = False, cosine: float = 0.0) -> None:
        super().__init__()
        self.normalise, self.cosine = normalise, cosine
        self.size: Tensor | None
        self.register_buffer("size", torch.ones(()) if normalise else None)  # s²; saved with the predictor
        self.seen: Tensor | None
        self.register_buffer("seen", torch.zeros(()) if normalise else None)  # gradients so far

    @property
    def scale(self) -> Tensor | float:
        """s."""
        return 1.0 if self.size is None else self.size.sqrt()

    @torch.no_grad()
    def observe(self, target: Tensor) -> None:
        """A gradient N·g arrived, as rows: s² follows. Nothing here reads a number back from the device."""
        if self.size is None or self.seen is None:
            return
        square = target.square().sum() / target.shape[0]
        usable = torch.isfinite(square) & (square > 0)  # of silence there is no size
        self.seen += usable
        share = 1 / self.seen.clamp(1, MEMORY)  # the first is taken as it is
        mean = (1 - share) * self.size + share * square
        self.size.copy_(torch.where(usable, mean, self.size))

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """0-dim."""
        error = (predicted - target).square().sum()
        if self.size is not None:
            error = error / self.size
        if self.cosine:
            error = error + self.cosine * (1 - _cosines(predicted, target)).sum()
        return error / target.shape[0]


def _cosines(predicted: Tensor, target: Tensor) -> Tensor:
    """Row by row. A guess shorter than a tenth of its target has no direction yet: the paper's begin at zero, where the
    derivative of a cosine is none, or so large that Adam would not forget it for thousands of steps.
    """
    length = target.norm(dim=1)
    floor = (0.1 * length).clamp_min(torch.finfo(target.dtype).tiny)
    shorter = predicted.detach().norm(dim=1) < floor
    own = torch.where(shorter, floor, predicted.masked_fill(shorter[:, None], 1.0).norm(dim=1))
    cosines: Tensor = (predicted * target).sum(1) / (own * length.clamp_min(torch.finfo(target.dtype).tiny))
    return cosines


class Replay:
    """The newest batches whose gradient came, to be learnt from again: as much memory as so many (h, y, g) take.

    Not saved with a checkpoint: a resumed run fills it anew.

    Args:
        size: batches kept; 0: none.
        steps: times that all of them are learnt from when one comes.
    """

    def __init__(self, size: int = 0, steps: int = 1) -> None:
        self.steps = steps
        self.kept: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=size)

    def lesson(self, h: Tensor, y: Tensor, g: Tensor) -> list[tuple[float, Tensor, Tensor, Tensor]]:
        """(weight, h, y, g) of what one step is to be taken on. What came a batches ago weighs 1/√(1 + a)."""
        found = [(1.0, h, y, g), *(((1 + age) ** -0.5, *old) for age, old in enumerate(self.kept, start=1))]
        self.kept.appendleft((h, y, g))
        return found


__all__ = ["Distance", "Replay", "rows"]
