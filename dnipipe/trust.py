"""Whether a prediction is good enough to be used, judged by how the last ones compared with what arrived.

likeness   cosine of ĝ and g, a running mean over some MEMORY gradients
           ──────╲            ╱──────────   threshold + MARGIN: used again
                  ╲__________╱              below threshold: not used, only measured
length     |ĝ| / |g|, a running geometric mean, likewise: above `longest` not used, until it is below by MARGIN

A prediction that says no more than it knows is shorter than g, most of which is the chance of one batch.
How late a g comes has no threshold: of a stage from which none comes at all, no more than service.unguided_batches are
predicted for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dnipipe.likeness import dots, likeness

MEMORY = 16  # gradients that the running means go back, about
READ = 4  # gradients between two looks at the means: each look waits for the device
MARGIN = 0.05  # by which they must be better than a threshold to be trusted again
MOST = 1e3  # times longer or shorter that a single prediction counts as at most


class Trust:
    """One predictor's.

    Args:
        threshold: cosine below which the prediction is not used; -1: whatever it is.
        longest: |ĝ| / |g| above which it is not used; 0: however long it is.
    """

    def __init__(self, threshold: float = -1.0, longest: float = 0.0) -> None:
        self.threshold, self.longest = threshold, longest
        self.good = True
        self.likeness: float | None = None
        self.length = 1.0
        self._unread: list[Tensor] = []  # (3,) dots

    @property
    def part(self) -> float:
        """What of a prediction might be used that is not trusted: its likeness, for as long a one as g is."""
        return (self.likeness or 0.0) / max(1.0, self.length)

    def observe(self, predicted: Tensor, g: Tensor) -> None:
        """A gradient came, and this is what had been predicted for it: both (B, D...)."""
        if self.threshold <= -1 and not self.longest:
            return
        self._unread.append(dots(predicted, g))
        if len(self._unread) >= READ:
            self.judge()

    def judge(self) -> None:
        """Look at what has been observed; a stage that is saved has an opinion on all of it."""
        rows = torch.stack(self._unread) if self._unread else torch.zeros(0, 3)
        self._unread = []
        rows = rows[rows[:, 2] != 0]  # nothing is like a gradient of zero
        cosines, lengths = (found.tolist() for found in likeness(rows))
        for cosine, length in zip(cosines, lengths, strict=True):
            finite = math.isfinite(cosine) and math.isfinite(length)  # what is no number deserves no trust
            self._see(cosine if finite else -1.0, min(MOST, max(1 / MOST, length)) if finite else MOST)
        if self.likeness is not None:
            margin = 0.0 if self.good else MARGIN
            like = self.threshold <= -1 or self.likeness >= self.threshold + margin
            short = not self.longest or self.length <= self.longest * (1 - margin)
            self.good = like and short

    def _see(self, cosine: float, length: float) -> None:
        first = self.likeness is None
        before = cosine if self.likeness is None else self.likeness
        self.likeness = before + (cosine - before) / MEMORY
        self.length = length if first else self.length * (length / self.length) ** (1 / MEMORY)


__all__ = ["Trust"]
