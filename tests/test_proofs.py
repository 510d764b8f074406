"""Longer proofs, of what the README claims about learning: `pytest -m slow`, some minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dnipipe.config import load
from dnipipe.data import load as load_data

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
MNIST = pytest.mark.skipif("DNIPIPE_MNIST" not in os.environ, reason="DNIPIPE_MNIST, the folder with MNIST, is NOT SET")


def trained(run: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "dnipipe", "train", *arguments, f"--output.run={run}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def test_the_default_run_is_clearly_better_than_a_bigram_model(tmp_path: Path) -> None:
    task = load_data(load(None))
    assert task.baseline is not None
    assert trained(tmp_path / "run")["eval"]["loss"] < task.baseline[1] - 0.2


@MNIST
@pytest.mark.parametrize("rule", ["blend", "synthetic", "wait"])
def test_mnist_in_four_stages_has_a_test_error_of_at_most_1_9_percent(tmp_path: Path, rule: str) -> None:
    where = f"--data.root={os.environ['DNIPIPE_MNIST']}"
    found = trained(tmp_path / "run", str(ROOT / "examples" / "mnist.toml"), where, f"--rule.name={rule}")
    assert found["eval"]["accuracy"] >= 1 - 0.019


@MNIST
def test_frozen_lower_stages_are_far_worse(tmp_path: Path) -> None:
    """So those above are not the last stage's doing."""
    where = f"--data.root={os.environ['DNIPIPE_MNIST']}"
    frozen = ("--rule.warmup=1000000", "--rule.warmup_rule=zero")
    found = trained(tmp_path / "run", str(ROOT / "examples" / "mnist.toml"), where, *frozen)
    assert found["eval"]["accuracy"] < 1 - 0.04
