"""Models that guess a gradient: ĝ = M(h, y), made from a stage's output and the labels alone.

    Regression   linear, mlp, conv: the paper's (arXiv:1608.05343). The net's output is the gradient itself; its last
                 layer starts at zero, so at first no gradient is guessed. Conditioned on the labels it is cDNI.
    VFBN         a virtual forward-backward network (Miyato et al. 2017): ĝ = ∂/∂h loss(A(h), y), A a small head.
    Completed    VFBN's, and what a Regression makes of h, y and that: what the head misses of what arrives.

Units. On the wire and in `predict`, a gradient is d(mean loss over the batch)/d(element of h). Inside, predictors work
per loss term: N·g, N = the number of loss terms in the batch, so that a target does not shrink with the batch size.
One loss for all of them, reduced in one place (lessons.py): the squared distance summed over the features of a loss
term, averaged over the N terms:  L_M = (1/N) Σ (N·ĝ − N·g)².  Its weight is the paper's, 1, for the paper's predictors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.heads import Scores, Similarity
from dnipipe.labels import counting, loss_terms, one_hot
from dnipipe.lessons import Distance, rows

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, labels) -> mean loss over the batch, 0-dim


class Predictor(nn.Module, ABC):
    """What a learner (learner.py) asks of a predictor. It either computes ĝ, or has a loss whose gradient ĝ is.

    Args:
        distance: how far a guess is from what arrived.
        matching: weight of that distance; 0: it does not learn from what arrives.
    """

    def __init__(self, distance: Distance, matching: float = 1.0) -> None:
        super().__init__()
        self.distance, self.matching = distance, matching

    @abstractmethod
    def terms(self, h: Tensor, y: Tensor) -> Tensor:
        """N·ĝ, the gradient of one loss term, of h's shape, with a graph back to the parameters."""

    def predict(self, h: Tensor, y: Tensor) -> Tensor | None:
        """ĝ for h (B, D...), of h's shape and the wire's unit, detached; None: ĝ is the gradient of its own loss."""
        return None

    def own_loss(self, h: Tensor, y: Tensor) -> Tensor | None:
        """What to minimise at once, 0-dim, and what ĝ is the gradient of at h; None: it has none, and `predict`s."""
        return None

    def completed(self, h: Tensor, y: Tensor, own: Tensor) -> Tensor:
        """ĝ, of the gradient of its own loss at h; all of h's shape, detached, in the wire's unit."""
        return own

    def loss(self, h: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """What to minimise, 0-dim: distance to the gradient g that arrived."""
        target = rows(loss_terms(y) * g, y)
        return self.matching * cast(Tensor, self.distance(rows(self.terms(h, y), y), target))

    def observe(self, y: Tensor, g: Tensor) -> None:
        """A gradient arrived: before it is learnt from, however often."""
        self.distance.observe(rows(loss_terms(y) * g, y))


@dataclass(frozen=True)
class Edge:
    """What a predictor must know of the place where it stands: shapes of one batch, B first."""

    h: tuple[int, ...]  # the stage's output
    y: tuple[int, ...]  # the labels
    output: tuple[int, ...]  # the whole model's output
    classes: int | None  # labels are whole numbers in [0, classes); None: they are no class labels

    @property
    def per_token(self) -> bool:
        """Every position of h (B, T, D) has a label of its own."""
        return len(self.h) == 3 and len(self.y) == 2 and self.y == self.h[:2]


# -- the paper's -------------------------------------------------------------------------------------------------


class Labels(nn.Module):
    """Labels as features beside h: one-hot (samples), channels of ones (conv), an embedding (tokens); of one that is
    ignored, zeros.
    """

    def __init__(self, edge: Edge) -> None:
        super().__init__()
        assert edge.classes is not None
        self.classes = edge.classes
        self.embedding = nn.Embedding(edge.classes, edge.h[-1]) if edge.per_token else None
        self.features = edge.h[-1] if edge.per_token else edge.classes

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        if self.embedding is not None:
            labels = self.embedding(y.clamp(min=0)) * counting(y).unsqueeze(-1)
            return torch.cat([h, labels], dim=-1)  # (B, T, D) -> (B, T, 2D)
        labels = one_hot(y, self.classes).to(h.dtype)  # (B, C)
        if h.dim() == 4:
            masks = labels[:, :, None, None].expand(-1, -1, *h.shape[2:])  # (B, C, H, W)
            return torch.cat([h, masks], dim=1)
        for _ in range(h.dim() - 2):
            labels = labels.unsqueeze(1)
        return torch.cat([h, labels.expand(*h.shape[:-1], -1)], dim=-1)


class Regression(Predictor):
    """M(h, y) = net([h, labels]), regressed on the gradients that arrive: DNI, and cDNI with labels.

    Args: net maps features (rows, D + label features), or channels for a 4-dimensional h, to D. It is applied to all
    loss terms as rows of one batch, so that its batch norm sees tokens like samples.
    """

    def __init__(self, net: nn.Module, labels: Labels | None, distance: Distance) -> None:
        super().__init__(distance)
        self.net = net
        self.labels = labels

    def terms(self, h: Tensor, y: Tensor) -> Tensor:
        """The net's output, times the running size of what arrives if that is kept."""
        seen = h if self.labels is None else self.labels(h, y)
        if h.dim() == 4:
            return cast(Tensor, self.net(seen)) * self.distance.scale
        return cast(Tensor, self.net(seen.flatten(0, -2))).view(*h.shape[:-1], -1) * self.distance.scale

    @torch.no_grad()
    def predict(self, h: Tensor, y: Tensor) -> Tensor:
        return self.terms(h, y) / loss_terms(y)


# -- virtual forward-backward network ----------------------------------------------------------------------------


class VFBN(Predictor):
    """ĝ = ∂/∂h loss(A(h), y): a small head A is trained so that its own gradient is the one that arrives.

    It minimises  loss(A(h), y)  as soon as h is there, and  matching · (1/N) Σ (N·ĝ − N·g)²  when g is. The first is
    the local loss: alone, it is greedy layer-wise training (Belilovsky et al. 2019). Learnt as late as g, it lets the
    head lag behind its stage, and under eight batches a hop training goes backwards (docs/learning-measured.md). The
    second needs the head's second derivative, so nothing in A may be a fused kernel without one. Source: Miyato et
    al., ICLR 2017 workshop, "Synthetic gradient methods with virtual forward-backward networks".

    Args:
        head: A, from h to the model's output; or to features, of which `scores` makes the output.
        loss: the model's own.
        matching: weight of the second part; 0 leaves it out. distance: how it is measured.
        similarity: another loss of h beside the head's, and its share of the two.
    """

    def __init__(
        self,
        head: nn.Module,
        loss: Loss,
        matching: float,
        scores: Scores | None = None,
        similarity: tuple[Similarity, float] | None = None,
        distance: Distance | None = None,
    ) -> None:
        super().__init__(distance or Distance(), matching)
        self.head = head
        self.task_loss = loss
        self.scores = scores
        self.similarity = similarity[0] if similarity else None
        self.share = similarity[1] if similarity else 0.0

    def own_loss(self, h: Tensor, y: Tensor) -> Tensor:
        if self.scores is None:
            loss = self.task_loss(self.head(h), y)
        else:
            loss = self.task_loss(*self.scores.among(self.head(h), y))
        if self.similarity is None:
            return loss
        return (1 - self.share) * loss + self.share * cast(Tensor, self.similarity(h, y))

    def terms(self, h: Tensor, y: Tensor) -> Tensor:
        h = h.detach().requires_grad_()
        (predicted,) = torch.autograd.grad(self.own_loss(h, y), h, create_graph=True)
        return loss_terms(y) * predicted


class Completed(VFBN):
    """ĝ = ∂/∂h loss(A(h), y) + C(h, y, ∂/∂h loss(A(h), y)).

    The head A learns from its own loss alone, at once; C, zero at first, learns what the gradients that arrive have
    beyond the head's, when they do. So nothing needs a second derivative.

    Args: beyond, C; the others are VFBN's.
    """

    def __init__(self, vfbn: VFBN, beyond: Regression) -> None:
        similarity = (vfbn.similarity, vfbn.share) if vfbn.similarity else None
        super().__init__(vfbn.head, vfbn.task_loss, vfbn.matching, vfbn.scores, similarity, vfbn.distance)
        self.beyond = beyond

    def terms(self, h: Tensor, y: Tensor) -> Tensor:
        h = h.detach().requires_grad_()
        (own,) = torch.autograd.grad(self.own_loss(h, y), h)
        own = loss_terms(y) * own
        return own + self._beyond(h.detach(), y, own)

    @torch.no_grad()
    def completed(self, h: Tensor, y: Tensor, own: Tensor) -> Tensor:
        return own + self._beyond(h, y, loss_terms(y) * own) / loss_terms(y)

    def _beyond(self, h: Tensor, y: Tensor, own: Tensor) -> Tensor:
        return self.beyond.terms(torch.cat([h, own], dim=1 if h.dim() == 4 else -1), y)
