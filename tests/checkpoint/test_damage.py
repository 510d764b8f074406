"""What is unfinished, damaged or hostile is passed over and named, or refused when it is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dnipipe import checkpoint
from dnipipe.errors import CheckpointError
from tests.checkpoint.disk import flip, resign, truncate
from tests.checkpoint.states import plain, save, small


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "manifest missing": lambda folder: os.remove(folder / "manifest.json"),
    "manifest half written": lambda folder: (folder / "manifest.json").rename(folder / "manifest.json.tmp"),
    "manifest cut short": lambda folder: truncate(folder / "manifest.json"),
    "manifest empty": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "manifest changed": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"seed": 200', '"seed": 201')
    ),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "manifest too deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{}"),
    "manifest a folder": lambda folder: a_folder(folder / "manifest.json"),
    "manifest a link": lambda folder: a_link(folder / "manifest.json"),
    "part missing": lambda folder: os.remove(folder / "stage-1.safetensors"),
    "part truncated": lambda folder: truncate(folder / "stage-1.safetensors"),
    "part empty": lambda folder: (folder / "stage-1.safetensors").write_bytes(b""),
    "part flipped": lambda folder: flip(folder / "stage-1.safetensors"),
    "part a pipe": lambda folder: a_pipe(folder / "stage-1.safetensors"),
    "part a link": lambda folder: a_link(folder / "stage-1.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_passed_over_and_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    save(tmp_path, 100, small(100))
    damage(save(tmp_path, 200, small(200)))
    found = checkpoint.newest(tmp_path)
    assert found.batch == 100 and found.weights()["1.w"].tolist() == [101.0] * 3
    assert len(found.skipped) == 1 and "00000200" in found.skipped[0] and "\n" not in found.skipped[0]


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda content: content.update(format=2),
    "batch": lambda content: content.update(batch=300),
    "settings": lambda content: content.update(settings=[1]),
    "no parts": lambda content: content.update(parts=[]),
    "stages": lambda content: content.update(stages=3),
    "part": lambda content: content.update(parts=[1, 2]),
    "bytes": lambda content: content["parts"][0].update(bytes="many"),
    "negative": lambda content: content["parts"][0].update(bytes=-1),
    "boundary": lambda content: content["parts"][0].update(boundary="\x1b[2J"),
    "one boundary twice": lambda content: content["parts"][0].update(boundary=""),
    "tensors": lambda content: content["parts"][0].update(tensors=[]),
    "section": lambda content: content["parts"][0]["tensors"].update({"../../etc/passwd": ["float32", [1]]}),
    "name": lambda content: content["parts"][0]["tensors"].update({"weights/\x00": ["float32", [1]]}),
    "shape": lambda content: content["parts"][0]["tensors"].update({"weights/0.w": ["float32", [-3]]}),
    "form": lambda content: content["parts"][0]["tensors"].update({"weights/0.w": "float32"}),
    "number": lambda content: content["parts"][0]["numbers"].update({"optimizer/0.w/step": "3"}),
    "number as weight": lambda content: content["parts"][0]["numbers"].update({"weights/0.v": 3}),
    "gradient": lambda content: content["parts"][0]["tensors"].update({"gradients/0.w": ["float32", [2]]}),
    "gradient of nothing": lambda content: content["parts"][0]["tensors"].update({"gradients/0.v": ["float32", [3]]}),
    "counter": lambda content: content["parts"][0]["counters"].update(n=[]),
    "weight twice": lambda content: content["parts"][0]["tensors"].update({"weights/1.w": ["float32", [3]]}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_is_checked_whatever_its_checksum_says(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    save(tmp_path, 100, small(100))
    resign(save(tmp_path, 200, small(200)) / "manifest.json", change)
    found = checkpoint.newest(tmp_path)
    assert found.batch == 100 and "00000200" in found.skipped[0] and found.skipped[0].isprintable()


@pytest.mark.parametrize(
    "tensor", [{"weights/0.w": ["float64", [3]]}, {"weights/0.w": ["float32", [3]], "weights/0.v": ["float32", [1]]}]
)
def test_a_file_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path, tensor: dict[str, Any]) -> None:
    folder = save(tmp_path, 200, small(200))
    resign(folder / "manifest.json", lambda content: content["parts"][0].update(tensors=tensor))
    with pytest.raises(CheckpointError, match=r"stage-0.safetensors is damaged"):
        checkpoint.newest(tmp_path).weights()


def test_damage_after_the_choice_is_noticed_when_the_file_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 200, small(200))
    found = checkpoint.at(tmp_path, 200)
    flip(folder / "stage-1.safetensors")
    assert plain(found.state_for({"0.w": torch.ones(3)}, "0").weights) == plain(small(200)[0].weights)
    with pytest.raises(CheckpointError, match=r"stage-1.safetensors is damaged"):
        found.state_for({"1.w": torch.ones(3)}, "")


def test_no_checkpoint_says_so_and_what_was_passed_over(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*checkpoints: name a run"):
        checkpoint.newest(tmp_path)
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)  # not ours
    checkpoint.save_part(tmp_path, 7, 0, small(7)[0])
    with pytest.raises(CheckpointError, match=r"passed over: .*00000007.*never completed"):
        checkpoint.newest(tmp_path)
    with pytest.raises(CheckpointError, match=r"00000009.*never completed"):
        checkpoint.at(tmp_path, 9)
