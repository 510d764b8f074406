"""What cannot be saved, and parts that are no checkpoint together, are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dnipipe import checkpoint
from dnipipe.checkpoint import StageState
from dnipipe.errors import CheckpointError
from tests.checkpoint.disk import Killed, resign
from tests.checkpoint.states import small


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": {"w": torch.ones(1), "bad\nname": torch.ones(1)}}, "bad"),
        ({"weights": {"w": torch.ones(1), "": torch.ones(1)}}, "name"),
        ({"weights": {"w": 1.0}}, "weights/w"),
        ({"weights": {"w": torch.ones(1, dtype=torch.complex128)}}, "complex128"),
        ({"optimizer": {"v": {"step": 1}}}, "optimizer state of v"),
        ({"gradients": {"v": torch.ones(1)}}, "'gradients/v' is no weight's gradient"),
        ({"optimizer": {"w": {"a/b": 1}}}, "a/b"),
        ({"optimizer": {"w": {"kind": "text"}}}, "optimizer/w/kind"),
        ({"counters": {"n": torch.ones(1)}}, "counter 'n'"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    empty: dict[str, Any] = {"optimizer": {}, "predictor": {}, "predictor_optimizer": {}, "counters": {}}
    with pytest.raises(CheckpointError, match=named):
        checkpoint.save_part(
            tmp_path, 1, 0, StageState(**{"weights": {"w": torch.ones(1)}, "boundary": "", **empty, **change})
        )
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.tmp"))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    states = small(1, stages=3)
    checkpoint.save_part(tmp_path, 1, 1, states[1])
    with pytest.raises(CheckpointError, match=r"lacks stage-0.safetensors, stage-0.json, stage-2.safetensors"):
        checkpoint.complete(tmp_path, 1, 3, {}, keep=1)
    assert not (tmp_path / "checkpoints" / "00000001" / "manifest.json").exists()


def test_parts_of_two_different_cuts_make_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.save_part(tmp_path, 1, 0, StageState({"0.w": torch.ones(1), "1.w": torch.ones(1)}, {}, "1", {}, {}, {}))
    checkpoint.save_part(tmp_path, 1, 1, small(1)[1])
    with pytest.raises(CheckpointError, match=r"stages 0 and 1 both saved '1\.w'"):
        checkpoint.complete(tmp_path, 1, 2, {}, keep=1)


@pytest.mark.parametrize(
    "change", [{"stage": 0}, {"batch": 2}, {"counters": 3}, {"bytes": 5}], ids=["stage", "batch", "form", "size"]
)
def test_a_record_that_is_not_this_parts_makes_no_checkpoint(tmp_path: Path, change: dict[str, Any]) -> None:
    for k, state in enumerate(small(1)):
        checkpoint.save_part(tmp_path, 1, k, state)
    resign(tmp_path / "checkpoints" / "00000001" / "stage-1.json", lambda record: record.update(change))
    with pytest.raises(CheckpointError, match=r"00000001/stage-1"):
        checkpoint.complete(tmp_path, 1, 2, {}, keep=1)


def test_a_part_saved_again_but_not_to_the_end_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k, state in enumerate(small(1)):
        checkpoint.save_part(tmp_path, 1, k, state)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            checkpoint.save_part(tmp_path, 1, 1, small(50)[1])
    with pytest.raises(CheckpointError, match=r"lacks stage-1\.json:"):
        checkpoint.complete(tmp_path, 1, 2, {}, keep=1)
