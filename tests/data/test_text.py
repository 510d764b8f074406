"""Text: every byte once, in an order the seed decides, the end held out; and Python's own sources as a text."""

from __future__ import annotations

import math
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dnipipe import data
from dnipipe.config import Config, build
from dnipipe.errors import DataError
from tests.data.conftest import drawn, text_config


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


@pytest.mark.skipif("DNIPIPE_TEXT" not in os.environ, reason="DNIPIPE_TEXT, a text file, is NOT SET")
def test_a_real_text() -> None:
    task = data.load(text_config(Path(os.environ["DNIPIPE_TEXT"]), context=64, batch=32))
    assert task.baseline is not None and 1 < task.baseline[1] < math.log(256)


# -- Python's own sources ----------------------------------------------------------------------------------------


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
