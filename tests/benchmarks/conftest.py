"""What the tests of the benchmarks share: records as they would be written, without a run behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, Record

TOML = """
[model]
name = "transformer"
layers = 2
width = 16
heads = 2
[data]
name = "text"
batch = 8
context = 16
[pipeline]
stages = 2
[train]
batches = 30
[eval]
every = 10
sample = 0
[transport]
kind = "local"
"""


def tiny(folder: Path, *words: str, **labels: object) -> Cell:
    """A cell of a run that takes a second."""
    path = folder / "tiny.toml"
    path.write_text(TOML)
    return Cell("tiny", labels, str(path), words)


def record(cell: Cell, loss: float | None, **values: Any) -> Record:
    """As if the cell had been run; without a loss it diverged at batch 7."""
    usual: dict[str, Any] = {
        "cell": str(cell),
        "command": "",
        "settings": cell.settings,
        "loss": loss,
        "accuracy": None,
        "diverged": 7 if loss is None else None,
        "seconds": 30.0,
        "evaluations": [[10.0, 3.0, 0.1], [30.0, loss or 9.0, 0.2]],
        "training": [],
        "cosine": [[[10.0, 0.5]], []],
        "stage": [],
        "torch": "2",
        "date": "2026-01-01",
        "processor": "one",
    }
    return Record(**{**usual, **values})
