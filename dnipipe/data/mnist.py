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
from dnipipe.data.images import check_labels, task_of
from dnipipe.data.task import Task
from dnipipe.errors import DataError

SIDE = 28  # pixels of an image
DEFLATE = 1032  # times that gzip can shrink its input at most


def read(config: Config) -> Task:
    """Images (B, 1, 28, 28) float32 in [0, 1], labels (B,) int64 (images.py)."""
    root = config.data.root
    return task_of(config, "MNIST", _digits(root, "train"), lambda: _digits(root, "t10k"))


def _digits(root: str, part: str) -> tuple[Tensor, Tensor]:
    """One part ("train", "t10k"): images (N, 1, 28, 28) and labels (N,), both uint8."""
    images = _idx(_find(root, f"{part}-images-idx3-ubyte"), (SIDE, SIDE))
    path = _find(root, f"{part}-labels-idx1-ubyte")
    labels = _idx(path, ())
    if len(images) != len(labels):
        raise DataError(
            f"{path} has {len(labels)} labels, but there are {len(images)} images: take both from one source"
        )
    check_labels(labels, str(path), "MNIST")
    return images.unsqueeze(1), labels


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
