"""Models that guess a stage's input: I_k(x) ≈ h_{k-1}, made from the network's input alone (arXiv:1608.05343).

    x (B, F...) numbers   ─► flattened ─► dense                                     ─► (B, D)
    x (B, C, H, W) images ─► convolution, norm, ReLU ─► mean down to ─► convolution ─► (B, C', H', W')
    x (B, T) tokens       ─► embedding + position ─► dense, each token by itself    ─► (B, T, D)

The paper's: built as its synthetic-gradient models are, with a single hidden layer. Trained by the squared distance to
what the stage before really sends, summed over the features of a sample and averaged over the B samples.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.config import Predictor as Settings
from dnipipe.errors import ConfigError, MessageError
from dnipipe.nets import convolutions, dense
from dnipipe.optim import in_one_kernel
from dnipipe.predictors import Edge

Shape = tuple[int, ...]


class Inputs:
    """I_k and its optimizer (Adam).

    Args:
        net: x -> ĥ.
        x, dtype: of one batch of the network's input, B first, as it was planned; dtype by name.
        tokens: x holds whole numbers in [0, tokens); 0: it holds no tokens.
    """

    def __init__(self, net: nn.Module, x: Shape, dtype: str, tokens: int, lr: float) -> None:
        self.net, self.x, self.dtype, self.tokens = net, x, dtype, tokens
        self.optimizer = in_one_kernel(torch.optim.Adam, net.parameters(), lr=lr)

    def check(self, x: Tensor) -> None:
        """Raises MessageError unless x is like what was planned for; another number of samples, or fewer tokens, is."""
        name, shape = str(x.dtype).removeprefix("torch."), tuple(x.shape)
        like = shape[1:] == self.x[1:] or (self.tokens and len(shape) == 2 and shape[1] <= self.x[1])
        if name != self.dtype or not like:
            raise MessageError(
                f"the network's input is {name} {list(shape)}, and {self.dtype} {list(self.x)} was planned"
            )
        if self.tokens and bool(((x < 0) | (x >= self.tokens)).any()):
            raise MessageError(
                f"the network's input has a token outside [0, {self.tokens}), the classes of the labels: "
                "rule.forward_unlock takes them for one vocabulary"
            )

    @torch.no_grad()
    def guess(self, x: Tensor) -> Tensor:
        """ĥ, what the stage trains on."""
        guessed: Tensor = self.net(x)
        return guessed

    def learn(self, x: Tensor, h: Tensor) -> Tensor:
        """One step towards the input h that was really sent; returns ĥ before it. Raises MessageError."""
        guessed: Tensor = self.net(x)
        if guessed.shape != h.shape:
            raise MessageError(f"an activation {list(h.shape)} came, where {list(guessed.shape)} was guessed")
        loss = (guessed - h).square().sum() / len(h)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return guessed.detach()


class Tokens(nn.Module):
    """(B, T) whole numbers to (B, T, D): what the token is, plus where it stands, through one hidden layer."""

    def __init__(self, vocabulary: int, length: int, features: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, features)
        self.position = nn.Embedding(length, features)
        self.rows = _unlike(dense(features, features, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.token(x) + self.position.weight[: x.shape[1]]  # (B, T, D) + (T, D)
        guessed: Tensor = self.rows(seen.flatten(0, 1))
        return guessed.view_as(seen)


def build(settings: Settings, x: Shape, dtype: str, edge: Edge) -> Inputs:
    """I_k for batches x of this dtype, and the edge that it guesses for. Raises ConfigError where they do not fit.

    The hidden layer has predictor.width features, or its own default: 4 D, or as many channels as h.
    """
    h, tokens = edge.h, 0
    if len(h) == 4 and len(x) == 4:
        net = _unlike(convolutions(x[1], h[1], 1, settings.width or h[1]))
        net.insert(len(net) - 1, nn.AdaptiveAvgPool2d(h[2:]))
    elif len(h) == 2 and dtype.startswith(("float", "bfloat")):
        features = torch.Size(x[1:]).numel()
        net = nn.Sequential(nn.Flatten(), _unlike(dense(features, h[1], 1, settings.width or 4 * h[1])))
    elif edge.per_token and x == edge.y and dtype == "int64" and edge.classes:
        tokens = edge.classes
        net = nn.Sequential(Tokens(tokens, x[1], h[2], settings.width or 4 * h[2]))
    else:
        raise ConfigError(
            f"rule.forward_unlock = true cannot guess an activation {h} from the network's input, {dtype} {x}: only "
            "(B, D) from numbers, (B, C, H, W) from images, (B, T, D) from tokens with a label each; use false"
        )
    return Inputs(net, x, dtype, tokens, settings.lr)


def _unlike(net: nn.Sequential) -> nn.Sequential:
    """A last layer that starts at random, unlike a gradient's, which starts at zero.

    A guess of zero would be the same for every sample, and the gradient that comes back through batch norm of samples
    that are all alike is hundreds of times too large.
    """
    last = net[-1]
    assert isinstance(last, (nn.Linear, nn.Conv2d))
    last.reset_parameters()
    return net


__all__ = ["Inputs", "build"]
