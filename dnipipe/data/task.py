"""What a data set is to the rest: a Task, whose batches (x, y) are checked before anything is done with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dnipipe.errors import DataError
from dnipipe.labels import IGNORED, counting, outside
from dnipipe.pairs import Given, joined, parted


class Batches(Protocol):
    """Batches (x, y), x perhaps a pair (pairs.py), from the start again with each iter(): what `load` makes, a
    DataLoader, a list.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True, eq=False)
class Task:
    """What there is to learn."""

    train: Batches
    validation: Batches | None  # None: nothing to evaluate on
    classes: int | None  # labels are whole numbers in [0, classes); None: not known
    corpus: str  # one line: what it is, how much, what is held out
    baseline: tuple[str, float] | None  # what a simple model reaches on `validation`: (its name, nats per byte)
    prompt: Tensor | None  # (1, T) int64, bytes to continue; None: this is no text


def length_of(batches: Batches | None) -> int | None:
    """None: it is not known (a generator, a DataLoader over a stream), or there are none at all."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


class Samples:
    """Batches gathered from tensors in memory.

    Args:
        samples: their number.
        size: samples a batch; the last one has what is left.
        order: draws the positions (samples,) of one epoch, int64. It is called once by each iter(), at once, so that
            torch.manual_seed just before it decides the epoch.
        gather: positions (B,) -> x, y.
    """

    def __init__(
        self,
        samples: int,
        size: int,
        order: Callable[[], Tensor],
        gather: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.samples, self.size, self.order, self.gather = samples, size, order, gather

    def __len__(self) -> int:
        return math.ceil(self.samples / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.gather, torch.split(self.order(), self.size))


def check_batch(pair: object, classes: int | None, batch: int) -> tuple[Given, Tensor]:
    """A batch as (x, y), looked at before it is used; `batch` is its number, for the message.

    Raises DataError: no such pair, no samples, numbers of samples that differ, labels outside [0, classes).
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], Tensor):
        raise DataError(f"batch {batch} is {_kind(pair)}: expected a pair (x, y) of tensors")
    given, y = pair
    try:
        x, along = parted(tuple(given) if isinstance(given, list) else given)  # torch's collate makes lists of pairs
    except TypeError:
        raise DataError(
            f"batch {batch}: x is {_kind(given)}: expected a tensor, or a pair of them with the batch's samples first, "
            "of which the second needs no gradient"
        ) from None
    if x.dim() == 0 or y.dim() == 0 or x.shape[0] != y.shape[0]:
        raise DataError(
            f"batch {batch}: x {tuple(x.shape)} and y {tuple(y.shape)} differ in their number of samples, "
            "the first dimension: each sample needs its label"
        )
    if x.numel() == 0 or y.numel() == 0:
        raise DataError(f"batch {batch} is empty: x {tuple(x.shape)}, y {tuple(y.shape)}")
    if classes is not None:
        _check_labels(y, classes, batch)
    return joined(x, along), y


def _check_labels(y: Tensor, classes: int, batch: int) -> None:
    if y.is_floating_point() or y.is_complex():
        raise DataError(f"batch {batch}: labels are {y.dtype}, expected whole numbers in [0, {classes})")
    if not counting(y).any():
        raise DataError(f"batch {batch}: every label is {IGNORED}, which the loss ignores: leave such a batch out")
    wrong = outside(y, classes)
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise DataError(
            f"batch {batch}: label {y[position].item()} at position {list(position)} of y {tuple(y.shape)} is outside "
            f"[0, {classes}): number the classes from 0; one that the loss is to ignore is {IGNORED}, as in "
            "torch.nn.functional.cross_entropy"
        )


def _kind(pair: object) -> str:
    if isinstance(pair, (tuple, list)):
        return f"a {type(pair).__name__} of {len(pair)} ({', '.join(type(part).__name__ for part in pair)})"
    return f"a {type(pair).__name__}"
