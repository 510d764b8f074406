"""Whether numbers are numbers, and what a forward left behind whose output was none."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

CURES = "lower optimizer.lr, set optimizer.clip, or go on without such batches with train.on_nan = skip"


def finite(tensor: Tensor) -> bool:
    """One pass and no copy; but a sum that is not finite may also be one that is too large."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


class Buffers:
    """A module's buffers as they are now: BatchNorm's statistics are NaN for ever once a batch was."""

    def __init__(self, module: nn.Module) -> None:
        self.kept = [(buffer, buffer.clone()) for buffer in module.buffers()]

    @torch.no_grad()
    def put_back(self) -> None:
        for buffer, before in self.kept:
            buffer.copy_(before)


__all__ = ["CURES", "Buffers", "finite"]
