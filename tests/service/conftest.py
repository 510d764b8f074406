"""Three stages as services of their own, on loopback, in a folder that is thrown away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dnipipe.service import ledger

CONFIG = """
[model]
width = 16
heads = 2
[data]
limit = 40000
batch = 8
context = 16
validation = 0.05
[pipeline]
stages = 3
[train]
batches = {batches}
[eval]
sample = 0
[service]
addresses = {addresses}
save_every = 0.5
patience = 60.0
{more}
[output]
run = "{run}"
every = 0.2
"""
LIMIT = 90.0  # seconds, for a machine that is busy


class Services:
    """The stages of one run, each `dnipipe stage` with its supervisor; of a script, if there is one, else of CONFIG."""

    def __init__(self, folder: Path, batches: int, more: str, files: bool, script: str = "") -> None:
        self.run, self.config = folder / "run", folder / ("train.py" if script else "run.toml")
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (one, two)]
        if files:
            addresses = [f"{folder}/0", f"{folder}/1"]
        text = CONFIG.format(batches=batches, run=self.run, more=more, addresses=json.dumps(addresses))
        self.config.write_text(script or text)
        words = f"--output.run={self.run} --service.addresses={','.join(addresses)} {more}"
        self.words = words.split() if script else []
        self.supervisors: dict[int, subprocess.Popen[str]] = {}
        self.said = {k: folder / f"said-{k}" for k in range(3)}

    def start(self, *stages: int) -> None:
        for k in stages:
            if k in self.supervisors:
                self.supervisors[k].wait(10)
            command = [sys.executable, "-m", "dnipipe", "stage", str(self.config), "--index", str(k), *self.words]
            with self.said[k].open("a") as said:
                self.supervisors[k] = subprocess.Popen(
                    command, stdout=said, stderr=said, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )

    def pid(self, stage: int) -> int:
        """Of the stage's own process, under its supervisor, whose command it shares."""
        above = self.supervisors[stage].pid
        for pid in self.pids():
            with contextlib.suppress(OSError):
                if f"PPid:\t{above}\n" in Path(f"/proc/{pid}/status").read_text():
                    return pid
        raise AssertionError(f"stage {stage} has no process: {self.said[stage].read_text()}")

    def pids(self) -> list[int]:
        """Of all processes of the run, supervisors too."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.config) in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
        return found

    def kill(self, stage: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(stage), number)

    def account(self, stage: int) -> ledger.Account:
        path = self.run / f"stage-{stage}" / ledger.NAME
        return ledger.read(path) if path.exists() else ledger.Account()

    def until(self, what: str, happens: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not happens():
            said = {k: path.read_text()[-600:] for k, path in self.said.items() if path.exists()}
            assert time.monotonic() < end, f"not within {LIMIT:g} s: {what}; {said}"
            time.sleep(0.05)

    def until_trained(self, stage: int, batch: int) -> None:
        self.until(f"stage {stage} trains batch {batch}", lambda: self.account(stage).last >= batch)

    def statuses(self) -> list[int]:
        self.until("all end", lambda: all(one.poll() is not None for one in self.supervisors.values()))
        return [self.supervisors[k].returncode for k in sorted(self.supervisors)]

    def loss(self) -> float:
        found: float = json.loads((self.run / "summary.json").read_text())["eval"]["loss"]
        return found

    def close(self) -> None:
        for one in self.supervisors.values():
            if one.poll() is None:
                one.terminate()
        for one in self.supervisors.values():
            try:
                one.wait(10)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Callable[..., Services]]:
    made: list[Services] = []

    def make(batches: int, more: str = "", files: bool = False, script: str = "") -> Services:
        made.append(Services(tmp_path, batches, more, files, script))
        return made[-1]

    yield make
    for each in made:
        each.close()
