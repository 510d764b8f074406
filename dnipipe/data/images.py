"""Images in memory as a Task: what is held out, batches of floats in [0, 1], and sizes that cannot be trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dnipipe.config import Config
from dnipipe.data.task import Samples, Task
from dnipipe.errors import ConfigError, DataError

CLASSES = 10  # of MNIST, and of CIFAR-10
Part = tuple[Tensor, Tensor]  # images (N, C, H, W) and labels (N,), both uint8


def task_of(config: Config, name: str, train: Part, test: Callable[[], Part]) -> Task:
    """Images (B, C, H, W) float32 in [0, 1], labels (B,) int64. data.limit cuts both parts, each to that many.

    Held out is the end of the training images, data.validation of them, or with data.evaluate = test the test set,
    which is read only then.
    """
    data, (images, labels) = config.data, train
    if data.evaluate == "test":
        held = "the test set"
        held_images, held_labels = test()
    else:
        held = "the last of the training images"
        cut = len(images) - int(len(images) * data.validation)
        images, held_images = images[:cut], images[cut:]
        labels, held_labels = labels[:cut], labels[cut:]
    most = data.limit or None
    training = _batches(images[:most], labels[:most], data.batch, shuffle=True)
    validation = _batches(held_images[:most], held_labels[:most], data.batch, shuffle=False)
    if not training.samples or not validation.samples:
        raise DataError(
            f"{data.root} leaves {training.samples} images to train on and {validation.samples} to evaluate on: "
            "change data.validation"
        )
    if data.batch == 1 or training.samples % data.batch == 1:
        raise ConfigError(
            f"{training.samples} images in batches of {data.batch} leave a batch of one, and batch norm cannot learn "
            "from one sample: change data.batch"
        )
    corpus = f"{name}: {training.samples:,} images to train on, {validation.samples:,} to evaluate on ({held})"
    return Task(training, validation, CLASSES, corpus, None, None)


def _batches(images: Tensor, labels: Tensor, size: int, shuffle: bool) -> Samples:
    count = len(images)

    def gather(positions: Tensor) -> Part:
        return images[positions].float() / 255, labels[positions].long()

    return Samples(count, size, lambda: torch.randperm(count) if shuffle else torch.arange(count), gather)


def check_labels(labels: Tensor, where: str, name: str) -> None:
    """Raises DataError for the first label (N,) that is no class of theirs."""
    wrong = (labels >= CLASSES).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise DataError(
            f"{where}: label {int(labels[i])} at position {i} is outside [0, {CLASSES}): this is not {name}"
        )
