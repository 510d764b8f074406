"""What the tests of the data sets read: a text of a thousand bytes, and images that say their number."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dnipipe import data
from dnipipe.config import Config, build


def text_config(path: Path, **settings: Any) -> Config:
    return build({"data": {"name": "text", "root": str(path), "context": 8, "batch": 3, **settings}})


def mnist_config(root: Path, **settings: Any) -> Config:
    return build({"model": {"name": "mlp"}, "data": {"name": "mnist", "root": str(root), "batch": 4, **settings}})


def cifar10_config(root: Path, **settings: Any) -> Config:
    return build({"model": {"name": "mlp"}, "data": {"name": "cifar10", "root": str(root), "batch": 4, **settings}})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(bytes(i * i % 251 for i in range(1000)))
    return path


def write_idx(folder: Path, part: str, count: int, packed: bool = False) -> None:
    """Image i is full of the value i, its label is i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">4I", 0x803, count, 28, 28) + b"".join(bytes([i]) * 784 for i in range(count))
    labels = struct.pack(">2I", 0x801, count) + bytes(i % 10 for i in range(count))
    for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        path = folder / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    write_idx(tmp_path / "mnist", "train", 30)
    write_idx(tmp_path / "mnist", "t10k", 11)
    return tmp_path / "mnist"


def write_cifar10(path: Path, first: int, count: int) -> None:
    """Image i has a red of i, a green of 100 and a blue of i but for its last pixel, 255; its label is i % 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = range(first, first + count)
    path.write_bytes(b"".join(bytes([i % 10, *[i] * 1024, *[100] * 1024, *[i] * 1023, 255]) for i in images))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """30 images in five files of 6, and 11 in the test set."""
    for k in range(5):
        write_cifar10(tmp_path / "cifar" / f"data_batch_{k + 1}.bin", 6 * k, 6)
    write_cifar10(tmp_path / "cifar" / "test_batch.bin", 50, 11)
    return tmp_path / "cifar"


def drawn(batches: data.Batches, seed: int) -> list[tuple[Tensor, Tensor]]:
    """An epoch. The seed that stands before iter() counts; another one after it must not matter."""
    torch.manual_seed(seed)
    epoch = iter(batches)
    torch.manual_seed(0)
    return list(epoch)


def values(batches: data.Batches, seed: int = 0) -> list[int]:
    """Which images an epoch of the written ones consists of, in order."""
    return [round(value * 255) for x, _ in drawn(batches, seed) for value in x[:, 0, 0, 0].tolist()]
