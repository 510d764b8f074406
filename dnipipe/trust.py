"""Whether a prediction is good enough to be used, judged by how the last ones compared with what arrived.

likeness   cosine of ĝ and g, a running mean over some MEMORY gradients
           ──────╲            ╱──────────   threshold + MARGIN: used again
                  ╲__________╱              below threshold: not used, only measured
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEMORY = 16  # gradients that the running mean goes back, about
READ = 4  # gradients between two looks at the mean: each look waits for the device
MARGIN = 0.05  # by which the likeness must exceed the threshold to be trusted again


class Trust:
    """One predictor's.

    Args:
        threshold: cosine below which the prediction is not used; -1 trusts it always.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.good = True
        self.likeness: float | None = None
        self._unread: list[Tensor] = []  # 0-dim cosines

    def observe(self, predicted: Tensor, g: Tensor) -> None:
        """A gradient came, and this is what had been predicted for it: both (B, D...)."""
        if self.threshold <= -1:
            return
        a, b = predicted.detach().flatten().float(), g.detach().flatten().float()
        self._unread.append(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(torch.finfo(torch.float32).tiny))
        if len(self._unread) >= READ:
            self.judge()

    def judge(self) -> None:
        """Look at what has been observed; a stage that is saved has an opinion on all of it."""
        cosines = torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        for cosine in cosines:
            seen = cosine if math.isfinite(cosine) else -1.0  # a prediction that is no number deserves no trust
            before = seen if self.likeness is None else self.likeness
            self.likeness = before + (seen - before) / MEMORY
        if self.likeness is not None:
            self.good = self.likeness >= self.threshold + (0.0 if self.good else MARGIN)


__all__ = ["Trust"]
