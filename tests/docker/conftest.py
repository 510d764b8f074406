"""docker/report.py and a made-up run of three stages for it, whose ledgers say what the test says.

stage 0, 1   ten batches a second ───── 1020 ─────────────── 1025 ───────── 1040      but for what the test says
stage 2      ten batches a second ───── killed, stands ───── ten again ────
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.launch.conftest import ROOT

FAULT = {"fault": "kill", "stage": 2, "begin": 1020.0, "end": 1020.5}
Times = dict[int, float]  # batch id -> when it was begun


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docker")
    return importlib.import_module("report")


def times(*pieces: tuple[float, float, float]) -> Times:
    """Of batches 1, 2 …: from when until when, and how many a second."""
    found = [begin + n / rate for begin, end, rate in pieces for n in range(round((end - begin) * rate))]
    return dict(enumerate(found, start=1))


STEADY = times((1000, 1040, 10))


def made(
    folder: Path,
    zero: Times = STEADY,
    one: Times = STEADY,
    two: Times | None = None,
    *,
    loss: float = 1.0,
    unguided: int = 200,
    fault: dict[str, Any] = FAULT,
) -> Path:
    """The run's folder. two: without it, all that stage 1 begins, but for what it begins while stage 2 stands."""
    if two is None:
        two = {batch: at for batch, at in one.items() if not 1020 <= at < 1025}
    again = {"start": 2, "from": 190, "before": 200, "time": 1024.0}
    alone = [{"alone": batch} for batch in sorted(set(one) - set(two))]
    for stage, (begun, more) in enumerate([(zero, []), (one, alone), (two, [again])]):
        lines = [{"begun": batch, "time": at} for batch, at in begun.items()]
        write(folder / f"stage-{stage}" / "ledger.jsonl", *lines, *more)
    write(folder / "faults.jsonl", fault)
    write(folder / "summary.json", {"eval": {"loss": loss}})
    (folder / "config.toml").write_text(f"[service]\nunguided_batches = {unguided}\n")
    return folder


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
