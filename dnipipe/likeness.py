"""How like a prediction ĝ is to the gradient g that came for it: their cosine, and |ĝ| / |g|.

ĝ, g (B, D...) ──dots──► ĝ·g, ĝ·ĝ, g·g  (3,)  ──likeness, many rows at once──► cosines and ratios, (N,) each
"""

from __future__ import annotations

import torch
from torch import Tensor


def dots(predicted: Tensor, g: Tensor) -> Tensor:
    """(3,) of two gradients (B, D...): ĝ·g, ĝ·ĝ, g·g, over the whole tensors."""
    wide = torch.promote_types(g.dtype, torch.float32)  # the squares of a float16 gradient would be zeros
    a, b = predicted.detach().flatten().to(wide), g.detach().flatten().to(wide)
    return torch.stack([torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)])


def likeness(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3) rows of `dots` to cosines and |ĝ| / |g|, both (N,); where g is zero, or one of the two gradients is not
    finite, one of them is not finite either.

    A prediction of zero, as the paper's predictors begin with, has cosine 0 and ratio 0.
    """
    length_a, length_b = rows[:, 1].sqrt(), rows[:, 2].sqrt()
    cosine = rows[:, 0] / length_b / length_a.clamp_min(torch.finfo(rows.dtype).tiny)
    return cosine.clamp(-1, 1), length_a / length_b


__all__ = ["dots", "likeness"]
