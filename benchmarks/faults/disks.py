"""Faults of the disk that a stage's own state is on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.faults.events import Event
from benchmarks.faults.pipeline import LIMIT, Hung, Pipeline

SMALL = 2**20  # bytes beside what the stage has there already: room for no other state


def full(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """For 1 to 5 s there is no room left in the stage's folder, a file system of its own."""
    filler = _folder(pipeline, stage) / "filler"
    begin = time.time()
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    time.sleep(rng.uniform(1, 5))
    filler.unlink()
    return Event(stage, begin, time.time())


def mounted(pipeline: Pipeline) -> None:
    """Each stage's folder becomes a small file system in memory, before the stage begins."""
    for stage in range(pipeline.stages):
        folder = _folder(pipeline, stage)
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * SMALL}", "dnipipe-faults", folder], check=True)


def unmounted(pipeline: Pipeline) -> None:
    for stage in range(pipeline.stages):
        subprocess.run(["umount", _folder(pipeline, stage)], check=False)


def no_mount() -> str:
    return "" if os.geteuid() == 0 else "root is needed for a file system of a stage's own"


def failing_sync(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """For 3 s every fsync of the stage's process fails with an I/O error."""
    pid = pipeline.pid(stage)
    begin = time.time()
    inject = ["-f", "-qq", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO", "-o", os.devnull, "-p", str(pid)]
    tracing = subprocess.Popen(["strace", *inject])
    time.sleep(3)
    tracing.terminate()
    tracing.wait()
    return Event(stage, begin, time.time())


def no_strace() -> str:
    return "" if shutil.which("strace") else "the command strace is missing"


def kill_while_saving(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """kill -9 while a file of its state is half written."""
    folder, pid = _folder(pipeline, stage) / "checkpoints", pipeline.pid(stage)
    assert pid is not None
    deadline = time.monotonic() + LIMIT
    while not any(folder.glob("*/*.tmp")):  # it is there for a few milliseconds
        if time.monotonic() > deadline:
            raise Hung(f"stage {stage} has saved nothing for {LIMIT:g} s")
    os.kill(pid, signal.SIGKILL)
    now = time.time()
    return Event(stage, now, now)


def damaged(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """A file of the stage's newest state is cut short, or a bit of it is flipped, and the stage is killed."""
    folder, pid = _folder(pipeline, stage) / "checkpoints", pipeline.pid(stage)
    assert pid is not None
    pipeline.until(f"stage {stage} saves", lambda: any(folder.glob("*/manifest.json")))
    os.kill(pid, signal.SIGSTOP)  # no newer state is saved meanwhile
    newest = max(folder.glob("*/manifest.json")).parent
    damage(rng.choice([newest / "manifest.json", newest / "stage-0.safetensors"]), rng)
    os.kill(pid, signal.SIGKILL)
    now = time.time()
    return Event(stage, now, now)


def damage(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def _folder(pipeline: Pipeline, stage: int) -> Path:
    return pipeline.run / f"stage-{stage}"
