"""The small nets that stand in for all later stages: VFBN's ĝ is the gradient of the loss of one of them.

    h ─► (Position) ─► (Attention) ─► (Pool) ─► Residual × hidden ─► a linear layer, or Scores ─► the output, guessed

Everything here must have a second derivative, for the matching differentiates ĝ once more: so no fused attention.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe.labels import counting, one_hot


class Position(nn.Module):
    """h + a vector of each place in the sequence, (B, T, D) to (B, T, D); zero at first."""

    def __init__(self, places: int, features: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(places, features))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.vectors[: h.shape[1]]


class Attention(nn.Module):
    """h + causal self-attention of norm(h), (B, T, D) to (B, T, D): what a token's gradient owes to those before it."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        likeness = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, T, T)
        later = torch.ones_like(likeness[0, 0], dtype=torch.bool).triu(1)
        mixed = likeness.masked_fill(later, float("-inf")).softmax(-1) @ v
        return h + cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))


class Residual(nn.Module):
    """h + W₂ gelu(W₁ norm(h)): a hidden layer."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, width), nn.GELU(), nn.Linear(width, features)
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + cast(Tensor, self.net(h))


class Pool(nn.Module):
    """One row a sample out of an activation with positions: the mean over tokens, or 2 × 2 means of an image."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, h: Tensor) -> Tensor:
        if self.dimensions == 4:
            return F.adaptive_avg_pool2d(h, 2).flatten(1)  # (B, C, H, W) -> (B, 4C)
        return h.flatten(1, -2).mean(1) if self.dimensions > 2 else h  # (B, T..., D) -> (B, D)


class Scores(nn.Linear):
    """A score for each class; for a large vocabulary, of the batch's own labels and a sample of the rest only.

    The classes sampled stand for all that were left out: log(left out / sampled) is added to their scores, so that the
    softmax's sum is right on average (uniform sampled softmax, Jean et al. 2015, arXiv:1412.2007). They go round the
    vocabulary from call to call, without a random number, so a run repeats.

    Args:
        sampled: how many besides the batch's own, fewer than there are classes.
    """

    def __init__(self, features: int, classes: int, sampled: int) -> None:
        super().__init__(features, classes)
        self.sampled = sampled
        self.next: Tensor
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))  # where the next sample begins

    def among(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """h (..., features) and labels y -> scores (..., C) of C classes, and y as numbers of these.

        Labels outside [0, classes) stay what they are.
        """
        known = (y >= 0) & (y < self.out_features)
        own, places = torch.unique(y[known], return_inverse=True)
        others = (self.next + torch.arange(self.sampled, device=y.device)) % self.out_features
        self.next.add_(self.sampled).remainder_(self.out_features)
        others = others[~torch.isin(others, own)]
        classes = torch.cat([own, others])
        weigh = (self.out_features - own.numel()) / max(1, others.numel())
        offset = self.bias[classes] + F.pad(h.new_full(others.shape, weigh).log(), (own.numel(), 0))
        renumbered = y.clone()
        renumbered[known] = places
        return F.linear(h, self.weight[classes], offset), renumbered


class Similarity(nn.Module):
    """How far samples of one class are from being alike, and of two classes from being unlike: the second loss of
    predsim (Nøkland and Eidnes 2019, arXiv:1901.06656, eq. 1 and 2): mean (S(W h) − S(one-hot y))².

    S: cosines between rows, each row less the mean of all rows. At most ROWS rows, evenly drawn from B or B·T of them;
    those whose label is ignored are left out of each mean.
    """

    ROWS = 256

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.project = nn.Linear(features, features)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """h (B, D) or (B, T, D), y (B,) or (B, T), to a loss, 0-dim."""
        rows, labels = h.flatten(0, -2), y.flatten()
        stride = -(-rows.shape[0] // self.ROWS)
        rows, labels = rows[::stride], labels[::stride]
        share = counting(labels).to(rows.dtype)
        share = share / share.sum().clamp(min=1)
        here = _cosines(self.project(rows), share)
        off = here - _cosines(one_hot(labels, self.classes).to(here.dtype), share)
        return share @ off.square() @ share


def _cosines(rows: Tensor, share: Tensor) -> Tensor:
    """(N, D) to (N, N). share (N,) is that of each row in their mean."""
    unit = F.normalize(rows - share @ rows, dim=1)
    return unit @ unit.T


__all__ = ["Attention", "Pool", "Position", "Residual", "Scores", "Similarity"]
