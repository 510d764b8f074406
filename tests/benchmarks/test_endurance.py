"""What `endurance` makes of a run's metrics; and, slow, that a run of 20,000 batches stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.endurance.__main__ import SETTINGS, report, run
from benchmarks.figures import OVERHEAD
from dnipipe.metrics import LABELS

MNIST = os.environ.get("DNIPIPE_MNIST", "")


def line(batch: int, batches: int, memory: int) -> dict[str, float]:
    """Each batch: 10 µs of every overhead, 100 µs of everything else."""
    spent = {f"processor.{label}": batches * (1e-5 if label in OVERHEAD else 1e-4) for label in LABELS}
    return {"batch": batch, "batches": batches, "memory": memory * 2**20, **spent}


def test_a_row_for_each_tenth_of_a_run() -> None:
    lines = [line(50 * n, 50, 100 + n) for n in range(1, 21)]
    text = report([lines, lines[:10]], 1000, "dnipipe train")
    others = len(LABELS) - len(OVERHEAD)
    every = 10 * len(OVERHEAD) + 100 * others
    one = f"{every} | {1000 * len(OVERHEAD) / every:.1f}"
    assert f"| 1 to 100 | {one} | 102 | {one} | 102 |" in text
    assert f"| 901 to 1,000 | {one} | 120 | – | – | – |" in text


@pytest.mark.slow
@pytest.mark.skipif(not MNIST, reason="DNIPIPE_MNIST is not set")
def test_memory_stays_what_it_is(tmp_path: Path) -> None:
    """From 10,000 to 20,000 batches: two hundred bytes kept of each would be 2 MB."""
    for own in run((*SETTINGS, "--rule.name", "blend", "--train.batches", "20000"), MNIST, tmp_path / "run"):
        held = [row["memory"] for row in own if 10000 <= row["batch"] < 20000]
        assert max(held) - held[0] < 2 * 2**20
