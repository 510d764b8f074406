"""A process that saves without end is interrupted in every way, again and again in one folder: the newest complete
checkpoint always loads, bit-equal, and is no older than what the process knew to be complete."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from dnipipe import checkpoint
from dnipipe.checkpoint import StageState
from tests.checkpoint.disk import flip, truncate
from tests.checkpoint.states import plain, save

WAYS = ("kill -9", "SIGTERM", "disk full", "I/O error", "cut short", "flipped")
NUMBERS = 20_000  # of a stage's tensor: a save takes some ms, so that a moment is often in the middle of one


def states(batch: int) -> list[StageState]:
    """Two stages, whose every bit is decided by the batch."""
    generator = torch.Generator().manual_seed(batch)
    made = []
    for k in range(2):
        weight, moment = torch.randn(2, NUMBERS, generator=generator)
        optimizer = {f"{k}.w": {"exp_avg": moment, "step": batch}}
        made.append(StageState({f"{k}.w": weight}, optimizer, "" if k else "0", {}, {}, {"batch": batch}))
    return made


def writer(run: Path, first: int, way: str, moment: float) -> None:
    """Saves from batch `first` on; says in `done` what is complete. With some ways it comes to its end by itself."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    left = 1 + int(20 * moment)  # calls of fsync
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    for batch in itertools.count(first):
        if batch == first + 2 and way == "disk full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment * 8 * NUMBERS), resource.RLIM_INFINITY))
        if batch == first + 2 and way == "I/O error":
            os.fsync = fsync
        try:
            save(run, batch, states(batch), keep=2)
        except OSError:
            return
        (run / "done").write_text(str(batch))


def interrupted(run: Path, first: int, way: str, rng: random.Random) -> int:
    """Let a writer begin at batch `first`, and interrupt it. Returns the last batch that is known to be complete."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not for each
    context.set_forkserver_preload([__name__])
    moment = rng.random()
    process = context.Process(target=writer, args=(run, first, way, moment))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while done(run) < first + 1 and time.monotonic() < deadline:  # two of its own: one of them may be damaged
            time.sleep(0.001)
        time.sleep(0.05 * moment)
        if way in ("kill -9", "cut short", "flipped"):
            process.kill()
        elif way == "SIGTERM":
            process.terminate()
        process.join(60)
        assert process.exitcode is not None, f"{way}: the writer did not end"
    finally:
        process.kill()
        process.join()
    return done(run)


def done(run: Path) -> int:
    text = (run / "done").read_text() if (run / "done").exists() else ""
    return int(text or 0)


def check(run: Path, at_least: int) -> int:
    found = checkpoint.newest(run)
    assert found.batch >= at_least
    wanted = states(found.batch)
    assert plain(found.weights()) == plain({name: w for state in wanted for name, w in state.weights.items()})
    for state in wanted:
        got = found.state_for(state.weights, state.boundary)
        assert plain(got.optimizer) == plain(state.optimizer)
    return found.batch


@pytest.mark.processes
@pytest.mark.parametrize(
    "times", [12, pytest.param(102, marks=[pytest.mark.slow, pytest.mark.timeout(600)])], ids=["short", "long"]
)
def test_the_newest_complete_checkpoint_always_loads(tmp_path: Path, times: int) -> None:
    rng = random.Random(times)
    batch = 0
    for number in range(times):
        way = WAYS[number % len(WAYS)]
        known = interrupted(tmp_path, batch + 1, way, rng)
        batch = max(known, *checkpoint_ids(tmp_path))
        if way in ("cut short", "flipped"):
            newest = checkpoint.newest(tmp_path)
            files = sorted([newest.folder / "manifest.json", *newest.folder.glob("*.safetensors")])
            (truncate if way == "cut short" else flip)(rng.choice(files))
            assert check(tmp_path, 0) < newest.batch
        else:
            check(tmp_path, known)


def checkpoint_ids(run: Path) -> list[int]:
    return [int(path.name) for path in (run / "checkpoints").iterdir()]
