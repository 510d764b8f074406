"""The paper's small nets (arXiv:1608.05343, appendix C.1): what guesses gradients, and what guesses inputs, is made of.

features ─► (Linear, batch norm, ReLU) × hidden ─► Linear, zero at first        or with 5 × 5 convolutions
"""

from __future__ import annotations

import torch.nn as nn


def dense(features: int, out: int, hidden: int, width: int) -> nn.Sequential:
    """(rows, features) to (rows, out), by way of `hidden` layers; zero at first."""
    layers: list[nn.Module] = []
    for _ in range(hidden):
        layers += [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, _zeroed(nn.Linear(features, out)))


def convolutions(channels: int, out: int, hidden: int, width: int) -> nn.Sequential:
    """(B, channels, H, W) to (B, out, H, W), by way of `hidden` layers; zero at first."""
    layers: list[nn.Module] = []
    for _ in range(hidden):
        layers += [nn.Conv2d(channels, width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, _zeroed(nn.Conv2d(channels, out, 5, padding=2)))


def _zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """The paper: the final regression layer starts at zero, so initially zero synthetic gradient is produced."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


__all__ = ["convolutions", "dense"]
