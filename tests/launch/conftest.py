"""Settings of a run of five batches, and the environment a script is started in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL

ROOT = Path(__file__).parents[2]
WORDS = [f"--{name}={value}" for name, value in {**SMALL, "train.batches": 5, "eval.sample": 0}.items()]
Together = Callable[..., list[str]]


def environment(**more: str) -> dict[str, str]:
    """Ours, with this Python's torchrun first on PATH, and nothing of a launcher that may have started the tests."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "SLURM_"))}
    path = f"{Path(sys.executable).parent}:{ours['PATH']}"
    package = f"{ROOT}:{ours.get('PYTHONPATH', '')}"
    return {**ours, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": package, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trained(run: Path, stages: int) -> None:
    """The run trained to its end, over all its stages, and was evaluated."""
    said = json.loads((run / "summary.json").read_text())
    assert said["stages"] == stages and said["train"]["batches"] == 5
    assert said["eval"]["loss"] > 0


@pytest.fixture
def together() -> Together:
    """Start commands at the same time, one an environment; what they printed, once all have ended with status 0."""

    def run(command: list[str], *environments: dict[str, str]) -> list[str]:
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=each)
            for each in environments
        ]
        try:
            said = [process.communicate(timeout=150)[0] for process in started]
        finally:
            for process in started:
                process.terminate()  # torchrun ends its stages; of one that has ended, nothing
        assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
        return said

    return run
