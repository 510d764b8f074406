"""What a run's folder says about it (docs/files.md), as a record."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Cell, Record
from dnipipe.config import Config

POINTS = 40  # of a curve in a record
OVERHEAD = ("serialize", "send", "receive", "keep", "loop", "report", "unaccounted")  # as docs/files.md has it
MEANS = ("cosine", "norm_ratio", "staleness", "at_once")


def read(cell: Cell, folder: Path, seconds: float, diverged: int | None) -> Record | None:
    """The record of a run that ended; None if it was stopped before its last batch."""
    total = cell.loaded.train.batches
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() and diverged is None else None
    if diverged is None and (summary is None or summary["train"]["batches"] < total):
        return None
    lines = [_lines(folder / "metrics" / f"stage-{k}.jsonl") for k in range(cell.loaded.pipeline.stages)]
    end = summary["eval"] if summary else {"loss": None, "accuracy": None}
    if end["loss"] is None and diverged is None:
        diverged = total  # finite up to its last batch, but what that left behind is not
    return Record(
        cell=str(cell),
        command=shlex.join(cell.command()),
        settings=cell.settings,
        loss=end["loss"],
        accuracy=end["accuracy"],
        diverged=diverged,
        seconds=round(seconds, 1),
        evaluations=[
            [line["eval.batch"], round(line["eval.loss"], 5), line["eval.accuracy"]]
            for line in lines[0]
            if "eval.loss" in line
        ],
        training=_curve(lines[-1], "loss", total),
        cosine=[_curve(own, "cosine", total) for own in lines],
        stage=[{name: stage[name] for name in MEANS} for stage in summary["stage"]] if summary else [],
        torch=version("torch"),
        date=time.strftime("%Y-%m-%d"),
        processor=computer(cell.loaded),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _curve(lines: Iterable[dict[str, Any]], name: str, total: int) -> list[list[float]]:
    """[batch, mean] at up to POINTS places of the run, each line counting by its batches."""
    parts: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if name in line and line["batches"]:
            parts[(line["batch"] - 1) * POINTS // total].append(line)
    means = []
    for part in parts.values():
        weight = sum(line["batches"] for line in part)
        means.append([part[-1]["batch"], round(sum(line[name] * line["batches"] for line in part) / weight, 4)])
    return means


def computer(settings: Config) -> str:
    """What a run with these settings computes on: a GPU's name, or the processor's."""
    on_gpu = torch.cuda.is_available() and settings.pipeline.device != "cpu"
    return torch.cuda.get_device_name() if on_gpu else processor()


def processor() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
