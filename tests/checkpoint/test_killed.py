"""Killed at any step, or the disk is full: the older checkpoint stays whole, and what is left over goes in time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from dnipipe import checkpoint
from dnipipe.checkpoint import StageState
from dnipipe.errors import CheckpointError
from tests.checkpoint.disk import Killed, die_at, files_limited_to
from tests.checkpoint.states import bits, folders, plain, save, small


def test_a_run_killed_at_any_step_has_a_whole_checkpoint_and_can_save_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (50, 100):
        save(tmp_path / "before", batch, small(batch))
    steps, seen = 0, set()
    while True:
        steps += 1
        run = tmp_path / str(steps)
        shutil.copytree(tmp_path / "before", run)
        with monkeypatch.context() as patch:
            done = die_at(patch, steps, Killed())
            with contextlib.suppress(Killed):
                save(run, 200, small(200), keep=2)
        found = checkpoint.newest(run)
        seen.add(found.batch)
        assert plain(found.weights()) == plain(
            {name: w for state in small(found.batch) for name, w in state.weights.items()}
        )
        save(run, 300, small(300), keep=2)
        assert folders(run)[-1] == 300 and len(folders(run)) == 2
        assert not list(run.rglob("*.tmp"))
        if len(done) < steps:
            break
    assert seen == {100, 200} and steps > 15


@pytest.mark.parametrize("step", range(1, 16))
def test_a_full_disk_is_a_clear_error_and_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save(tmp_path, 100, small(100))
    with monkeypatch.context() as patch:
        die_at(patch, step, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match=r"cannot .* 200: No space left on device; older checkpoints") as caught:
            save(tmp_path, 200, small(200))
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp"))  # they would keep the disk full
    assert plain(checkpoint.at(tmp_path, 100).weights())["1.w"] == bits(torch.full((3,), 101.0))


def test_files_are_synced_before_their_rename_and_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[int | str] = []  # inode of what was synced; "rename"
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        assert events[-1] == source.stat().st_ino
        real_replace(source, target)
        events.append("rename")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    folder = save(tmp_path, 1, small(1))
    inside = folder.stat().st_ino
    renames = [i for i, event in enumerate(events) if event == "rename"]
    assert len(renames) == 5 and all(events[i + 1] == inside for i in renames)
    assert events[-2:] == [folder.parent.stat().st_ino, tmp_path.stat().st_ino]


def test_an_old_checkpoint_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in (100, 200):
        save(tmp_path, batch, small(batch))

    def rmtree(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(OSError, match=r"checkpoint 300 is complete, but .* cannot be removed: Permission denied"):
        save(tmp_path, 300, small(300), keep=2)
    assert checkpoint.newest(tmp_path).batch == 300 and checkpoint.at(tmp_path, 200).batch == 200
    with pytest.raises(CheckpointError, match="never completed"):
        checkpoint.at(tmp_path, 100)


def test_a_write_that_the_kernel_refuses_half_way_keeps_its_errno(tmp_path: Path) -> None:
    save(tmp_path, 100, small(100))
    large = StageState({"0.w": torch.ones(1 << 20)}, {}, "", {}, {}, {})
    with pytest.raises(OSError, match="cannot save stage 0 at batch 200") as caught, files_limited_to(1 << 16):
        checkpoint.save_part(tmp_path, 200, 0, large)
    assert caught.value.errno == errno.EFBIG
    assert checkpoint.newest(tmp_path).batch == 100 and not list(tmp_path.rglob("*.tmp"))


def test_an_export_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, small(1))
    out = tmp_path / "model.safetensors"
    out.write_text("older")
    with monkeypatch.context() as patch:
        die_at(patch, 2, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match=r"cannot write .*model.safetensors: Input/output error"):
            checkpoint.export(checkpoint.weights(tmp_path), out)
    assert out.read_text() == "older" and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(OSError, match="No such file or directory"):
        checkpoint.export(checkpoint.weights(tmp_path), tmp_path / "nowhere" / "model.safetensors")


# -- tidying -----------------------------------------------------------------------------------------------------


def test_the_newest_complete_are_kept_and_older_unfinished_go(tmp_path: Path) -> None:
    for batch in (100, 200, 300):
        save(tmp_path, batch, small(batch))
    checkpoint.save_part(tmp_path, 350, 0, small(350)[0])  # unfinished, older than 400
    checkpoint.save_part(tmp_path, 500, 0, small(500)[0])  # unfinished, but still to come
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "checkpoints" / "00000001").symlink_to(outside)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    save(tmp_path, 400, small(400), keep=2)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"00000300", "00000400", "00000500", "00000001", "notes.txt"} and outside.is_dir()
    (tmp_path / "checkpoints" / "notes.txt").unlink()
    (tmp_path / "checkpoints" / "00000001").unlink()
    save(tmp_path, 500, small(500), keep=1)
    assert folders(tmp_path) == [500]


def test_parts_left_by_a_killed_start_with_more_stages_do_not_get_in(tmp_path: Path) -> None:
    save(tmp_path, 100, small(100))
    for k, state in enumerate(small(1, stages=4)):
        checkpoint.save_part(tmp_path, 200, k, state)
    folder = save(tmp_path, 200, small(200, stages=2))
    names = {"manifest.json", *(f"stage-{k}.{kind}" for k in (0, 1) for kind in ("json", "safetensors"))}
    assert {path.name for path in folder.iterdir()} == names
    assert {name: w[0].item() for name, w in checkpoint.weights(tmp_path).items()} == {"0.w": 200, "1.w": 201}
