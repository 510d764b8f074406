"""CIFAR-10: every image once, in its colours; files that are wrong are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dnipipe import cli, data
from dnipipe.config import build
from dnipipe.errors import ConfigError, DataError
from tests.data.conftest import cifar10_config, values


def test_cifar10_batches(pictures: Path) -> None:
    task = data.load(cifar10_config(pictures, evaluate="test"))
    x, y = next(iter(task.train))
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal((x[:, 0, 0, 0] * 255).round().long() % 10, y)  # images keep their labels
    assert torch.equal(x[:, 0], x[:, :1, 0, 0, None].expand(4, 32, 32))  # all red is one red
    assert (x[:, 1] == 100 / 255).all()
    assert (x[:, 2, 31, 31] == 1).all() and torch.equal(
        x[:, 2, 31, 30], x[:, 0, 0, 0]
    )  # the last pixel of the last row
    assert task.validation is not None
    assert values(task.validation) == list(range(50, 61))
    assert sorted(values(task.train)) == list(range(30)) and values(task.train, 1) != values(task.train, 2)
    assert (task.classes, task.baseline, task.prompt) == (10, None, None)
    assert task.corpus == "CIFAR-10: 30 images to train on, 11 to evaluate on (the test set)"


def test_cifar10_holds_out_the_last_images_and_needs_no_test_set_for_it(pictures: Path) -> None:
    (pictures / "test_batch.bin").unlink()
    task = data.load(cifar10_config(pictures, validation=0.2))
    assert task.validation is not None
    assert values(task.validation) == list(range(24, 30)) and sorted(values(task.train)) == list(range(24))
    task = data.load(cifar10_config(pictures, limit=6))
    assert sorted(values(task.train)) == list(range(6))


def test_cifar10_is_found_where_its_archive_was_unpacked(pictures: Path) -> None:
    pictures.rename(pictures.parent / "cifar-10-batches-bin")
    assert data.load(cifar10_config(pictures.parent)).corpus.startswith("CIFAR-10: 27 images")


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin"])
def test_a_missing_file_is_named(pictures: Path, name: str) -> None:
    (pictures / name).unlink()
    with pytest.raises(DataError, match=rf"no {name} in .*--data\.root PATH, the folder with data_batch_1\.bin"):
        data.load(cifar10_config(pictures, evaluate="test"))
    with pytest.raises(DataError, match=r"data.name = cifar10 needs its files: pass --data\.root PATH"):
        data.load(build({"model": {"name": "mlp"}, "data": {"name": "cifar10"}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c[:-1], "has 18437 bytes, which is no number of records of 3073"),
        (lambda c: c + b"x", "has 18439 bytes"),
        (lambda c: b"", "has 0 bytes"),
        (lambda c: c[: 3 * 3073] + b"\x0a" + c[3 * 3073 + 1 :], r"label 10 at position 3 is outside \[0, 10\)"),
        (lambda c: c[:3073] + b"\xff" + c[3074:], "label 255 at position 1 .* this is not CIFAR-10"),
    ],
)
@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
def test_a_bad_file_is_named(pictures: Path, name: str, spoil: Callable[[bytes], bytes], message: str) -> None:
    path = pictures / name
    if name == "test_batch.bin":
        path.write_bytes(path.read_bytes()[: 6 * 3073])  # as many as in the others
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{name}.* {message}|{name}: {message}") as caught:
        data.load(cifar10_config(pictures, evaluate="test"))
    assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataError, match=r"cannot read .*data_batch_1\.bin: Permission denied"):
        data.load(cifar10_config(pictures))


def test_a_last_batch_of_one_image_is_refused(pictures: Path) -> None:
    with pytest.raises(ConfigError, match="30 images in batches of 29 leave a batch of one"):
        data.load(cifar10_config(pictures, batch=29, evaluate="test"))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_plan_for_it(pictures: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--data.root={pictures}", "--data.name=cifar10", "--data.batch=6", f"--model.name={model}"]
    assert (
        cli.main(
            [
                "check",
                *words,
                "--data.validation=0.1",
                "--model.width=8",
                "--pipeline.stages=3",
                "--rule.name=synthetic",
                "--rule.forward_unlock",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "data    CIFAR-10: 27 images" in shown and "and x float32 [6, 3, 32, 32], 72 KiB" in shown
