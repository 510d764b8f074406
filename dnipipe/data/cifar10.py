"""CIFAR-10 from its binary files, each checked when it is read.

record   label 0 … 9, one byte │ 1,024 red │ 1,024 green │ 1,024 blue: 32 rows of 32 pixels, a byte each
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dnipipe.config import Config
from dnipipe.data.images import check_labels, task_of
from dnipipe.data.task import Task
from dnipipe.errors import DataError

IMAGE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # bytes
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)
FOLDER = "cifar-10-batches-bin"  # that their archive unpacks to


def read(config: Config) -> Task:
    """Images (B, 3, 32, 32) float32 in [0, 1], labels (B,) int64 (images.py)."""
    root = config.data.root
    return task_of(config, "CIFAR-10", _part(root, TRAIN), lambda: _part(root, TEST))


def _part(root: str, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The records of these files, one file behind the other: images (N, 3, 32, 32) and labels (N,), both uint8."""
    records = torch.cat([_records(_find(root, name)) for name in names])
    return records[:, 1:].reshape(-1, *IMAGE), records[:, 0].clone()  # a view would keep all of the records


def _find(root: str, name: str) -> Path:
    paths = [Path(root, folder, name) for folder in ("", FOLDER)]
    found = next((path for path in paths if path.is_file()), None) if root else None
    if found is None:
        raise DataError(
            f"{f'no {name} in {root}' if root else 'data.name = cifar10 needs its files'}: pass --data.root PATH, the "
            f"folder with {', '.join((*TRAIN, *TEST))}, as {FOLDER} of the binary version's archive has them"
        )
    return found


def _records(path: Path) -> Tensor:
    """(N, 3073) uint8."""
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not content or len(content) % RECORD:
        raise DataError(
            f"{path} has {len(content)} bytes, which is no number of records of {RECORD}: get the file again, from the "
            "binary version"
        )
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, RECORD)
    check_labels(records[:, 0], str(path), "CIFAR-10")
    return records
