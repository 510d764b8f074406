"""The training batches of a run, by their ids. Any process that has the data draws the same for the same id."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dnipipe.data.task import Task, check_batch, length_of
from dnipipe.errors import DataError
from dnipipe.pairs import Given
from dnipipe.randomness import reseed
from dnipipe.started import unheard


def drawn(task: Task, seed: int, start: int, total: int) -> Iterator[tuple[int, Given, Tensor]]:
    """(batch id, x, y) of the ids behind `start`, up to `total`. What is drawn depends on the seed and the id alone.

    Raises DataError for a batch that is none, and for data that end too early.
    """
    length = length_of(task.train)
    epoch, skip = divmod(start, length) if length else (0, start)  # a stream is drawn from its start
    batch = start - skip
    while batch < total:
        reseed(seed, "epoch", epoch)
        begun = batch
        with unheard():
            pairs = iter(task.train)
        while length is None or batch < begun + length:
            batch += 1
            reseed(seed, "data", batch)
            pair = next(pairs, None)
            if pair is None:
                _ended(batch, batch - begun - 1, length)
                batch -= 1
                break
            x, y = check_batch(pair, task.classes, batch)
            if batch > start:
                yield batch, x, y
            if batch == total:
                return
        epoch += 1


def _ended(batch: int, count: int, length: int | None) -> None:
    """An epoch's end, where its length was not known. Raises DataError if it was, or nothing was drawn."""
    if length is not None:
        raise DataError(
            f"the training data ended at batch {batch}, though its length is {length}: its __len__ and its batches "
            "disagree"
        )
    if not count:
        raise DataError(
            f"the training data ended before batch {batch} and begins no second time: pass what iter() starts "
            "anew, as a DataLoader does, or set train.batches to what there is"
        )


__all__ = ["drawn"]
