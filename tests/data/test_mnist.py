"""MNIST: found wherever it lies, every image once; files that are wrong are refused by name."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from dnipipe import data
from dnipipe.config import build
from dnipipe.errors import ConfigError, DataError
from tests.data.conftest import mnist_config, values, write_idx


def test_mnist_batches(digits: Path) -> None:
    task = data.load(mnist_config(digits, evaluate="test"))
    x, y = next(iter(task.train))
    assert x.shape == (4, 1, 28, 28) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal((x[:, 0, 0, 0] * 255).round().long() % 10, y)  # images keep their labels
    assert task.validation is not None
    assert values(task.validation) == list(range(11))
    assert sorted(values(task.train)) == list(range(30)) and values(task.train, 1) != values(task.train, 2)
    assert [len(y) for _, y in task.train] == [4] * 7 + [2] and len(task.train) == 8
    assert (task.classes, task.baseline, task.prompt) == (10, None, None)
    assert task.corpus == "MNIST: 30 images to train on, 11 to evaluate on (the test set)"


def test_mnist_holds_out_the_last_images(digits: Path) -> None:
    task = data.load(mnist_config(digits, validation=0.2))
    assert task.validation is not None
    assert values(task.validation) == list(range(24, 30)) and sorted(values(task.train)) == list(range(24))


def test_mnist_limit_cuts_both_parts(digits: Path) -> None:
    task = data.load(mnist_config(digits, limit=6, evaluate="test"))
    assert task.validation is not None
    assert sorted(values(task.train)) == list(range(6)) and values(task.validation) == list(range(6))


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_found_packed_or_not(tmp_path: Path, below: str, packed: bool) -> None:
    write_idx(tmp_path / below, "train", 30, packed)
    task = data.load(mnist_config(tmp_path))
    assert task.validation is not None
    assert values(task.validation) == [27, 28, 29]


def test_mnist_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data\.root PATH.*t10k-labels-idx1-ubyte.*torchvision"):
        data.load(mnist_config(tmp_path))
    with pytest.raises(DataError, match=r"needs its files: pass --data\.root PATH"):
        data.load(build({"model": {"name": "mlp"}, "data": {"name": "mnist"}}))


def huge(content: bytes) -> bytes:
    return content[:4] + struct.pack(">I", 2**32 - 1) + content[8:]


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("images-idx3", lambda c: c[:-1], "fewer bytes than the 30 items"),
        ("images-idx3", lambda c: c + b"x", "more bytes than the 30 items"),
        ("images-idx3", huge, "fewer bytes than the 4294967295 items"),
        ("images-idx3", lambda c: c[:10], "no MNIST file"),
        ("images-idx3", lambda c: c[:8] + struct.pack(">2I", 32, 32) + c[16:], r"sizes \[30, 32, 32\]"),
        ("labels-idx1", lambda c: b"\0\0\x0d\x01" + c[4:], "magic number 0xd01"),
        ("labels-idx1", lambda c: struct.pack(">2I", 0x801, 29) + c[8:-1], "29 labels, but there are 30 images"),
        ("labels-idx1", lambda c: c[:12] + b"\x0b" + c[13:], "label 11 at position 4"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_malformed(tmp_path: Path, part: str, spoil: Any, message: str, packed: bool) -> None:
    write_idx(tmp_path, "train", 30)
    path = tmp_path / f"train-{part}-ubyte"
    content = spoil(path.read_bytes())
    path.unlink()
    Path(f"{path}{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message):
        data.load(mnist_config(tmp_path))


@pytest.mark.parametrize(
    "spoil", [lambda c: c[: len(c) // 2], lambda c: b"no gzip" + c, lambda c: c[:12] + b"\xff" * 9]
)
def test_mnist_broken_gzip(tmp_path: Path, spoil: Any) -> None:
    write_idx(tmp_path, "train", 30, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=r"cannot read .*train-images-idx3-ubyte.gz"):
        data.load(mnist_config(tmp_path))


def test_a_last_batch_of_one_image_is_refused(digits: Path) -> None:
    with pytest.raises(ConfigError, match="30 images in batches of 29 leave a batch of one"):
        data.load(mnist_config(digits, batch=29, evaluate="test"))


@pytest.mark.skipif("DNIPIPE_MNIST" not in os.environ, reason="DNIPIPE_MNIST, the folder with MNIST, is NOT SET")
def test_the_real_mnist() -> None:
    task = data.load(mnist_config(Path(os.environ["DNIPIPE_MNIST"]), batch=256, evaluate="test"))
    assert task.corpus == "MNIST: 60,000 images to train on, 10,000 to evaluate on (the test set)"
    assert task.validation is not None
    _, y = next(iter(task.validation))
    assert y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
