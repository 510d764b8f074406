"""MNIST from its four files, compressed or not. What they claim and hold is checked once, when they are read."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from dnipipe.config import Config
from dnipipe.data.task import Samples, Task
from dnipipe.errors import ConfigError, DataError

DIGITS = 10  # classes of MNIST
SIDE = 28  # pixels of an image
DEFLATE = 1032  # times that gzip can shrink its input at most


def read(config: Config) -> Task:
    """Images (B, 1, 28, 28) float32 in [0, 1], labels (B,) int64. data.limit cuts both parts, each to that many."""
    data = config.data
    images, labels = _digits(data.root, "train")
    if data.evaluate == "test":
        held = "the test set"
        held_images, held_labels = _digits(data.root, "t10k")
    else:
        held = "the last of the training images"
        cut = len(images) - int(len(images) * data.validation)
        images, held_images = images[:cut], images[cut:]
        labels, held_labels = labels[:cut], labels[cut:]
    most = data.limit or None
    train = _images(images[:most], labels[:most], data.batch, shuffle=True)
    validation = _images(held_images[:most], held_labels[:most], data.batch, shuffle=False)
    if not train.samples or not validation.samples:
        raise DataError(
            f"{data.root} leaves {train.samples} images to train on and {validation.samples} to evaluate on: "
            "change data.validation"
        )
    if data.batch == 1 or train.samples % data.batch == 1:
        raise ConfigError(
            f"{train.samples} images in batches of {data.batch} leave a batch of one, and batch norm cannot learn from "
            "one sample: change data.batch"
        )
    corpus = f"MNIST: {train.samples:,} images to train on, {validation.samples:,} to evaluate on ({held})"
    return Task(train, validation, DIGITS, corpus, None, None)


def _images(images: Tensor, labels: Tensor, size: int, shuffle: bool) -> Samples:
    count = len(images)

    def gather(positions: Tensor) -> tuple[Tensor, Tensor]:
        return images[positions].unsqueeze(1).float() / 255, labels[positions].long()

    return Samples(count, size, lambda: torch.randperm(count) if shuffle else torch.arange(count), gather)


def _digits(root: str, part: str) -> tuple[Tensor, Tensor]:
    """One part ("train", "t10k"): images (N, 28, 28) and labels (N,), both uint8."""
    images = _idx(_find(root, f"{part}-images-idx3-ubyte"), (SIDE, SIDE))
    path = _find(root, f"{part}-labels-idx1-ubyte")
    labels = _idx(path, ())
    if len(images) != len(labels):
        raise DataError(
            f"{path} has {len(labels)} labels, but there are {len(images)} images: take both from one source"
        )
    wrong = (labels >= DIGITS).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise DataError(f"{path}: label {int(labels[i])} at position {i} is outside [0, {DIGITS}): this is not MNIST")
    return images, labels


def _find(root: str, name: str) -> Path:
    """The file, compressed or not; torchvision keeps its copy in MNIST/raw."""
    paths = [Path(root, folder, name + end) for folder in ("", "raw", "MNIST/raw") for end in ("", ".gz")]
    found = next((path for path in paths if path.is_file()), None) if root else None
    if found is None:
        raise DataError(
            f"{f'no {name} in {root}' if root else 'data.name = mnist needs its files'}: pass --data.root PATH, the "
            "folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            "t10k-labels-idx1-ubyte (.gz or not), for example the one that torchvision.datasets.MNIST downloads to"
        )
    return found


def _idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of bytes, (N, *shape) uint8. What its header claims is checked before memory is reserved for it."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            header = file.read(4 * (2 + len(shape)))
            count = _count(path, header, shape)
            expected = count * math.prod(shape)
            possible = path.stat().st_size * (DEFLATE if packed else 1)
            body = bytearray(file.read(expected + 1) if expected <= possible else b"")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; get the file again") from None
    if len(body) != expected:
        how = "more" if len(body) > expected else "fewer"
        raise DataError(f"{path} has {how} bytes than the {count} items that its header claims: get the file again")
    return torch.frombuffer(body, dtype=torch.uint8).view(count, *shape) if body else torch.empty(0, *shape).byte()


def _count(path: Path, header: bytes, shape: tuple[int, ...]) -> int:
    """N out of the header: a magic number (0, 0, 8 for bytes, the number of dimensions), N, the shape of one item."""
    wanted = 2 + len(shape)
    magic, *sizes = struct.unpack(f">{wanted}I", header) if len(header) == 4 * wanted else (0,)
    if magic != 0x801 + len(shape) or tuple(sizes[1:]) != shape:
        raise DataError(
            f"{path} is no MNIST file: magic number {magic:#x} and sizes {sizes}, expected {0x801 + len(shape):#x} and "
            f"[N{''.join(f', {size}' for size in shape)}]"
        )
    return int(sizes[0])
