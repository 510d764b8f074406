"""The data sets: every sample once, in an order the seed decides; files that are wrong are refused by name."""

from __future__ import annotations

import gzip
import math
import os
import struct
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dnipipe import config, data
from dnipipe.config import Config, build
from dnipipe.errors import ConfigError, DataError

EXAMPLES = Path(__file__).parents[1] / "examples"


def text_config(path: Path, **settings: Any) -> Config:
    return build({"data": {"name": "text", "root": str(path), "context": 8, "batch": 3, **settings}})


def mnist_config(root: Path, **settings: Any) -> Config:
    return build({"model": {"name": "mlp"}, "data": {"name": "mnist", "root": str(root), "batch": 4, **settings}})


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


def drawn(batches: data.Batches, seed: int) -> list[tuple[Tensor, Tensor]]:
    """An epoch. The seed that stands before iter() counts; another one after it must not matter."""
    torch.manual_seed(seed)
    epoch = iter(batches)
    torch.manual_seed(0)
    return list(epoch)


def values(batches: data.Batches, seed: int = 0) -> list[int]:
    """Which images an epoch of the written MNIST consists of, in order."""
    return [round(value * 255) for x, _ in drawn(batches, seed) for value in x[:, 0, 0, 0].tolist()]


# -- text --------------------------------------------------------------------------------------------------------


def test_text_windows_are_next_byte_prediction(text: Path) -> None:
    task = data.load(text_config(text))
    stored = text.read_bytes()
    for batches in (task.train, task.validation):
        assert batches is not None
        for x, y in drawn(batches, 0):
            assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape and x.shape[1] == 8
            assert all(bytes([*row, after[-1]]) in stored for row, after in zip(x.tolist(), y.tolist(), strict=True))
            assert torch.equal(x[:, 1:], y[:, :-1])


def test_validation_is_the_end_in_order_without_a_gap(text: Path) -> None:
    task = data.load(text_config(text))
    assert task.validation is not None
    x = torch.cat([x for x, _ in task.validation])
    held = text.read_bytes()[900:]
    assert bytes(x.flatten().tolist()) == held[:96]  # 100 held out: 12 windows of 8, and 4 that fill none
    assert [len(x) for x, _ in task.validation] == [3, 3, 3, 3] and len(task.validation) == 4


def test_training_never_sees_what_is_held_out_and_no_byte_twice(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100)) + bytes(range(200, 220)))
    task = data.load(text_config(path, validation=20 / 120))
    starts = set()
    for seed in range(20):
        seen = torch.cat([y for _, y in drawn(task.train, seed)]).flatten().tolist()
        assert len(set(seen)) == len(seen) == 11 * 8 and max(seen) < 100  # every value is its own position
        starts.add(min(seen) % 8)
    assert len(starts) > 3  # each epoch is cut elsewhere


def test_an_epoch_is_ragged_and_its_length_known(text: Path) -> None:
    task = data.load(text_config(text, batch=10))
    sizes = [len(x) for x, _ in task.train]
    assert sizes == [10] * 11 + [1] and len(task.train) == 12  # (900 - 8) // 8 = 111 windows, whatever the offset


def test_the_seed_before_iter_decides_the_epoch(text: Path, digits: Path) -> None:
    for task in (data.load(text_config(text)), data.load(mnist_config(digits))):
        one, same, other = (torch.cat([x for x, _ in drawn(task.train, seed)]) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_the_prompt_is_the_first_bytes_held_out(text: Path) -> None:
    prompt = data.load(text_config(text)).prompt
    assert prompt is not None and prompt.shape == (1, 8) and prompt.dtype == torch.int64
    assert bytes(prompt[0].tolist()) == text.read_bytes()[900:908]


def test_the_corpus_says_what_was_read(text: Path) -> None:
    assert data.load(text_config(text)).corpus == "text: 1,000 bytes, the last 100 held out"
    assert data.load(text_config(text, limit=500)).corpus == "text: 500 bytes, the last 50 held out"


def test_the_bigram_baseline_by_hand(text: Path) -> None:
    task = data.load(text_config(text))
    assert task.baseline is not None and task.validation is not None
    train = text.read_bytes()[:900]
    pairs: dict[tuple[int, int], int] = {}
    firsts: dict[int, int] = {}
    for a, b in pairwise(train):
        pairs[a, b] = pairs.get((a, b), 0) + 1
        firsts[a] = firsts.get(a, 0) + 1
    nats = [
        -math.log((pairs.get((a, b), 0) + 1) / (firsts.get(a, 0) + 256))
        for x, y in task.validation
        for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
    ]
    assert task.baseline[1] == pytest.approx(sum(nats) / len(nats))


def test_pairs_are_counted_across_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.randint(256, (50,), dtype=torch.uint8)
    whole = data.bigram(text, text)
    monkeypatch.setattr(data.text, "COUNT_AT_ONCE", 7)
    assert data.bigram(text, text) == whole


def test_text_too_short_or_missing(tmp_path: Path, text: Path) -> None:
    with pytest.raises(
        DataError, match=r"900 to train on and 100 held out, but context 100 needs at least 200 and 101"
    ):
        data.load(text_config(text, context=100))
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="0 bytes leave"):
        data.load(text_config(tmp_path / "empty"))
    with pytest.raises(DataError, match="No such file"):
        data.load(text_config(tmp_path / "none"))
    with pytest.raises(DataError, match=r"--data\.root FILE"):
        data.load(build({"data": {"name": "text"}}))


def test_stdlib_files_are_the_librarys_own(tmp_path: Path) -> None:
    kept = ["abc.py", "json/decoder.py", "asyncio/events.py"]
    left = [
        "site-packages/abc.py",
        "dist-packages/json/x.py",
        "sitecustomize.py",
        "_sysconfigdata__linux.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "test/test_json.py",
        "ctypes/test/x.py",
        "distutils/tests/x.py",
        "idlelib/idle_test/x.py",
        "ensurepip/_bundled/x.py",
        "json/__pycache__/decoder.pyc",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(data.stdlib_files(tmp_path)) == sorted(tmp_path / name for name in kept)


def test_stdlib_order_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    names = [f"json/{i}.py" for i in range(20)]
    for folder, order in (("a", names), ("b", names[::-1])):
        for name in order:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    one, other = ([p.name for p in data.stdlib_files(tmp_path / folder)] for folder in "ab")
    assert one == other == sorted(one)


def test_stdlib_is_sorted_by_the_files_own_names(tmp_path: Path) -> None:
    for name in ("json/encoder.py", "json/decoder.py", "ast.py", "email/encoders.py", "asyncio/base_events.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in data.stdlib_files(tmp_path)]
    assert names == ["ast.py", "asyncio/base_events.py", "json/decoder.py", "json/encoder.py", "email/encoders.py"]


def test_stdlib_is_cut_at_the_limit_and_the_same_each_time() -> None:
    settings = build({"data": {"limit": 50_000, "validation": 0.1, "batch": 64}})
    one, other = data.load(settings), data.load(settings)
    assert "50,000 bytes, the last 5,000 held out" in one.corpus and one.corpus == other.corpus
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in one.corpus
    assert one.validation is not None and other.validation is not None
    assert all(torch.equal(x, z) for (x, _), (z, _) in zip(one.validation, other.validation, strict=True))


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no source files .* --data\.name text"):
        data.load(Config())


# -- MNIST -------------------------------------------------------------------------------------------------------


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


# -- a user's batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (torch.zeros(2), "batch 5 is a Tensor: expected a pair"),
        ((torch.zeros(2),), r"a tuple of 1 \(Tensor\)"),
        ([torch.zeros(2), [1, 2]], r"a list of 2 \(Tensor, list\)"),
        ((torch.zeros(2, 3), torch.zeros(3)), r"batch 5: x \(2, 3\) and y \(3,\) differ"),
        ((torch.zeros(()), torch.zeros(())), "differ in their number of samples"),
        ((torch.zeros(0, 3), torch.zeros(0)), r"batch 5 is empty: x \(0, 3\), y \(0,\)"),
        (
            (torch.zeros(3), torch.tensor([0, 9, 10])),
            r"batch 5: label 10 at position \[2\] of y \(3,\) is outside \[0, 10\)",
        ),
        ((torch.zeros(2), torch.tensor([[0, 1], [-1, 2]])), r"label -1 at position \[1, 0\]"),
        ((torch.zeros(2), torch.zeros(2)), "labels are torch.float32, expected whole numbers"),
    ],
)
def test_batches_that_are_refused(pair: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.check_batch(pair, 10, 5)


def test_batches_that_pass() -> None:
    x, y = torch.zeros(2, 3), torch.tensor([0, 9])
    assert data.check_batch([x, y], 10, 1) == (x, y)
    target = torch.randn(2, 1)
    assert data.check_batch((x, target), None, 1)[1] is target  # a regression: no classes, any numbers


# -- examples and real files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist.toml", "lm.toml"])
def test_the_examples_load(name: str) -> None:
    settings = config.load(EXAMPLES / name, ["--data.root", "somewhere"])
    assert settings.pipeline.stages == 4 and settings.data.root == "somewhere"


@pytest.mark.skipif("DNIPIPE_MNIST" not in os.environ, reason="DNIPIPE_MNIST, the folder with MNIST, is NOT SET")
def test_the_real_mnist() -> None:
    task = data.load(mnist_config(Path(os.environ["DNIPIPE_MNIST"]), batch=256, evaluate="test"))
    assert task.corpus == "MNIST: 60,000 images to train on, 10,000 to evaluate on (the test set)"
    assert task.validation is not None
    _, y = next(iter(task.validation))
    assert y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


@pytest.mark.skipif("DNIPIPE_TEXT" not in os.environ, reason="DNIPIPE_TEXT, a text file, is NOT SET")
def test_a_real_text() -> None:
    task = data.load(text_config(Path(os.environ["DNIPIPE_TEXT"]), context=64, batch=32))
    assert task.baseline is not None and 1 < task.baseline[1] < math.log(256)
