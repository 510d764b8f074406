"""The data sets, as batches (x, y): MNIST or CIFAR-10 from its files, a text file, or Python's own source files.

    load(config) ─► Task(train, validation, …)       train       shuffled anew by each iter()
                                                     validation  in order, the held-out part
                     │ checks bytes once             both        every sample, the last batch shorter than the others
    check_batch(pair, classes, batch) ◄── each batch, a user's own too, before it is sent anywhere
    drawn(task, seed, start, total)   ──► (id, x, y): what the run trains on, the same wherever it is drawn

Samples stay bytes in memory, and become floats or int64 batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable

from dnipipe.config import Config
from dnipipe.data import cifar10, mnist, text
from dnipipe.data.drawn import drawn
from dnipipe.data.task import Batches, Samples, Task, check_batch, length_of
from dnipipe.data.text import bigram, stdlib_files

LOADERS: dict[str, Callable[[Config], Task]] = {
    "stdlib": text.read_stdlib,
    "text": text.read_file,
    "mnist": mnist.read,
    "cifar10": cifar10.read,
}


def load(config: Config) -> Task:
    """The data that the configuration names. Both parts come in batches of data.batch: what fits in memory and on the
    wire in training fits in evaluation too.

    Raises DataError if it is missing, malformed or too short, ConfigError for a last batch that cannot be trained on.
    """
    return LOADERS[config.data.name](config)


__all__ = ["Batches", "Samples", "Task", "bigram", "check_batch", "drawn", "length_of", "load", "stdlib_files"]
