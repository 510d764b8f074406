"""What a batch's labels say, whatever the loss is: which of them count, and which axis scores the classes they name.

A label of IGNORED is none: padding, or a token that is not to be guessed. torch's cross_entropy leaves such out of its
mean by itself, and here they count in no mean either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the default of ignore_index in torch.nn.functional.cross_entropy


def counting(y: Tensor) -> Tensor:
    """Which labels are not IGNORED: bool, of y's shape; where they are no whole numbers, all. Nothing is read back from
    the device.
    """
    if y.is_floating_point() or y.is_complex():
        return y.new_ones(y.shape, dtype=torch.bool)
    return y.long().ne(IGNORED)  # long: as uint8, -100 would be 156


def outside(y: Tensor, classes: int) -> Tensor:
    """Which of whole-number labels are neither in [0, classes) nor IGNORED: bool, of y's shape."""
    y = y.long()  # not every dtype can be compared
    return ((y < 0) | (y >= classes)) & counting(y)


def loss_terms(y: Tensor) -> Tensor | int:
    """N, at least 1: how many terms the mean loss averages over. Whole numbers count one each but for those IGNORED,
    other targets one a sample. A Tensor is 0-dim, on y's device.
    """
    return y.shape[0] if y.is_floating_point() else counting(y).sum().clamp(min=1)


def class_axis(output: tuple[int, ...], y: tuple[int, ...]) -> int | None:
    """Along which axis an output of this shape scores the classes that labels of this shape name: the last one, or 1 as
    in F.cross_entropy. None: these are no class labels. A single score is none of a class.
    """
    if len(output) != len(y) + 1:
        return None
    axis = len(output) - 1 if output[:-1] == y else 1
    return axis if output[axis] > 1 and (*output[:axis], *output[axis + 1 :]) == y else None


def one_hot(y: Tensor, classes: int) -> Tensor:
    """(..., classes) int64 of y (...); zeros for a label that is IGNORED."""
    return F.one_hot(y.clamp(min=0), classes) * counting(y).unsqueeze(-1)


__all__ = ["IGNORED", "class_axis", "counting", "loss_terms", "one_hot", "outside"]
