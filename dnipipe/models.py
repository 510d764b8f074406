"""The built-in models, each an nn.Sequential whose direct children are the layers between which it may be cut.

    mlp          layer0 … layer(n-2), output             n = model.layers    (B, C, H, W) ─► (B, 10)
    cnn          layer0 … layer(n-1), output             n = model.layers    (B, C, H, W) ─► (B, 10)
    transformer  embedding, block1 … block(n), output    n = model.layers    (B, T) bytes ─► (B, T, 256)

The number in a name is the layer's place, as pipeline.boundaries counts. What a model starts with depends on its
settings and on torch's random state alone, so every process builds the same one after the same torch.manual_seed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe.config import Config
from dnipipe.errors import ConfigError

IMAGES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}  # (C, H, W) of one image of data.name
CLASSES = 10  # of each
BYTES = 256  # the transformer's vocabulary
ENDS = {"mlp": 0, "cnn": 1, "transformer": 2}  # layers of each that model.layers does not count


def build(config: Config) -> nn.Sequential:
    """The model that the configuration names. Raises ConfigError if it cannot read the data that is named."""
    _check_data(config)
    return nn.Sequential(OrderedDict(BUILDERS[config.model.name](config)))


def layers_of(config: Config) -> int:
    """How many layers the model has, which is not made. Raises ConfigError as `build` does."""
    _check_data(config)
    return config.model.layers + ENDS[config.model.name]


def _check_data(config: Config) -> None:
    name, data = config.model.name, config.data.name
    if (name == "transformer") == (data in IMAGES):
        fitting = "mlp or cnn" if data in IMAGES else "transformer"
        raise ConfigError(f"model.name = {name} cannot read data.name = {data}: use model.name = {fitting}")


def loss_of(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """(output, labels) -> mean loss over the batch, 0-dim. Every built-in model has the same: cross-entropy in nats."""
    return cross_entropy


def cross_entropy(h: Tensor, y: Tensor) -> Tensor:
    """Mean over all loss terms of logits (B, C) and labels (B,), or (B, T, C) and (B, T): one term a token."""
    return F.cross_entropy(h.flatten(0, -2), y.flatten())


# -- the paper's nets for images --------------------------------------------------------------------------------


def _mlp(config: Config) -> dict[str, nn.Module]:
    """Hidden layers of Linear, batch norm and ReLU, and a linear output (arXiv:1608.05343, the MNIST FCN).

    model.layers counts the output layer, as the paper does: its 4-layer net is 3 hidden layers and the output.
    """
    width = config.model.width
    layers: dict[str, nn.Module] = {}
    features = math.prod(IMAGES[config.data.name])
    for i in range(config.model.layers - 1):
        parts: dict[str, nn.Module] = {"flatten": nn.Flatten()} if i == 0 else {}
        parts["linear"] = nn.Linear(features, width, bias=False)  # batch norm has its own bias
        parts |= {"norm": nn.BatchNorm1d(width), "relu": nn.ReLU(), **_dropout(config)}
        layers[f"layer{i}"] = nn.Sequential(OrderedDict(parts))
        features = width
    return layers | {"output": _linear_output(features)}


def _cnn(config: Config) -> dict[str, nn.Module]:
    """Blocks of 5 × 5 convolution, batch norm, ReLU and pooling, and a linear output (arXiv:1608.05343, the CNN).

    Pooling is 3 × 3: max in the first block, mean in the others. The paper does not give its stride; 2 with a padding
    of 1 halves the image, rounding up, so that any number of blocks fits.
    """
    width = config.model.width
    layers: dict[str, nn.Module] = {}
    for i in range(config.model.layers):
        first = i == 0
        pool = nn.MaxPool2d(3, 2, padding=1) if first else nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
        parts: dict[str, nn.Module] = {
            "conv": nn.Conv2d(IMAGES[config.data.name][0] if first else width, width, 5, padding=2, bias=False),
            "norm": nn.BatchNorm2d(width),
            "relu": nn.ReLU(),
            "pool": pool,
            **_dropout(config),
        }
        layers[f"layer{i}"] = nn.Sequential(OrderedDict(parts))
    return layers | {"output": _linear_output(_features(layers, IMAGES[config.data.name]))}


def _linear_output(features: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(features, CLASSES)))


@torch.no_grad()
def _features(layers: dict[str, nn.Module], image: tuple[int, ...]) -> int:
    """Numbers that one image (C, H, W) has become behind these layers."""
    h = torch.zeros(1, *image)
    for layer in layers.values():
        h = layer.eval()(h)  # in evaluation mode: batch norm counts nothing, dropout draws nothing
        layer.train()
    return h.numel()


def _dropout(config: Config) -> dict[str, nn.Module]:
    return {"dropout": nn.Dropout(config.model.dropout)} if config.model.dropout else {}


# -- a byte-level language model ---------------------------------------------------------------------------------


def _transformer(config: Config) -> dict[str, nn.Module]:
    """A decoder with pre-LayerNorm blocks. Initial weights: normal, 1/√(features in); less where a residual is added.

    As GPT-2's, but for the constant 0.02, which is right for its width and slow for a small one: after 600 batches of
    examples/lm.toml by plain backprop, 2.00 nats on the validation part instead of 1.88.
    """
    model = config.model
    layers: dict[str, nn.Module] = {"embedding": Embedding(model.width, config.data.context, model.dropout)}
    for i in range(1, model.layers + 1):
        layers[f"block{i}"] = Block(model.width, model.heads, model.dropout)
    layers["output"] = nn.Sequential(OrderedDict(norm=nn.LayerNorm(model.width), linear=nn.Linear(model.width, BYTES)))
    for layer in layers.values():
        layer.apply(_initialise)
        if isinstance(layer, Block):
            for residual in (layer.attention.out, layer.mlp.down):
                nn.init.normal_(residual.weight, std=(2 * model.layers * residual.in_features) ** -0.5)
    return layers


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.1)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)


class Embedding(nn.Module):
    """Bytes (B, T) to features (B, T, D): what the byte is, plus where it stands. T is at most `context`."""

    def __init__(self, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.token(x) + self.position.weight[: x.shape[1]]  # (B, T, D) + (T, D)
        dropped: Tensor = self.dropout(h)
        return dropped


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D): a position sees itself and what stands before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, D/heads)
        dropout = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mixed: Tensor = self.out(h.transpose(1, 2).flatten(2))  # (B, T, D)
        return mixed


class FeedForward(nn.Module):
    """(B, T, D) to (B, T, D) by way of 4 D features, each position by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(F.gelu(self.up(x)))
        return h


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward part. (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


BUILDERS: dict[str, Callable[[Config], dict[str, nn.Module]]] = {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer}

__all__ = ["build", "cross_entropy", "loss_of"]
