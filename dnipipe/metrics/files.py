"""Where the numbers go: lines of JSON by stage, TensorBoard, and the summary of a run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dnipipe.disk import disk
from dnipipe.errors import ConfigError
from dnipipe.metrics.clock import shares


class JsonLines:
    """One stage's numbers, a line a reading; a resumed run goes on with the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk(f"cannot write {path}", "name another folder with output.run", start=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def write(self, batch: int, numbers: dict[str, float]) -> None:
        """The whole line or none of it. Raises DiskError."""
        line = json.dumps({"time": time.time(), "batch": batch, **numbers}, allow_nan=False).encode() + b"\n"
        whole = os.fstat(self._file.fileno()).st_size
        with disk(f"cannot write {self._path}", "make room there, and resume the run"):
            try:
                while line:  # a disk that is nearly full takes a part
                    line = line[self._file.write(line) :]
            except OSError:
                with suppress(OSError):
                    self._file.truncate(whole)
                raise

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """The same numbers for TensorBoard. Raises ConfigError if the extra is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("output.tensorboard = true needs the extra: pip install 'dnipipe[tensorboard]'") from None
        with disk(f"cannot write in {folder}", "name another folder with output.run", start=True):
            self._writer: Any = SummaryWriter(str(folder))

    def write(self, stage: int, batch: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(f"{name}/stage-{stage}", value, batch)

    def close(self) -> None:
        self._writer.close()


def summary(
    rule: str,
    evaluation: tuple[float, float | None] | None,
    totals: Sequence[dict[str, float]],
    batch: int,
    finished: bool,
) -> dict[str, Any]:
    """summary.json: its keys are fixed; null where nothing was measured.

    Args:
        totals: those of stages 0 to K-1.
        batch: the last one's id.
        finished: whether the run came to its end, the last evaluation included.
    """
    first = totals[0]
    # a batch is trained when its last stage has trained it; of stages on their own, one may be older than this stage 0
    seconds = max(stage["training_seconds"] for stage in totals if stage["batches"] <= first["batches"])
    loss, accuracy = evaluation or (None, None)
    return {
        "stages": len(totals),
        "rule": rule,
        "batch": batch,
        "finished": finished,
        "train": {
            "batches": int(first["batches"]),
            "samples": int(first["samples"]),
            "seconds": seconds,
            "samples_per_second": first["samples"] / seconds if seconds > 0 else 0.0,
        },
        "eval": {"loss": _or_null(loss), "accuracy": _or_null(accuracy)},
        "stage": [_stage(index, numbers) for index, numbers in enumerate(totals)],
        "versions": {
            "dnipipe": _version("dnipipe"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "pyzmq": _version("pyzmq"),
        },
    }


def _stage(index: int, numbers: dict[str, float]) -> dict[str, Any]:
    """One stage's totals, nested. The counts came over the wire as floats."""
    nested: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in numbers.items():
        if "." in name:
            nested[name.partition(".")[0]][name.partition(".")[2]] = value
    return {
        "index": index,
        **{name: int(numbers[name]) for name in ("batches", "samples", "skipped", "unlearnt", "peak_memory")},
        **{name: numbers[name] for name in ("busy_seconds", "idle_seconds", "overhead", "overhead_of_work")},
        **{name: numbers.get(name) for name in ("cosine", "norm_ratio", "staleness", "at_once", "input_error")},
        "untraced": int(numbers["untraced"]) if "untraced" in numbers else None,
        "shares": shares(nested["seconds"]),
        "seconds": nested["seconds"],
        "processor": nested["processor"],
        "reasons": {reason: int(count) for reason, count in nested["skipped"].items()},
        "dropped": {reason: int(count) for reason, count in nested["dropped"].items()},
    }


def _or_null(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the new one. Raises ValueError for NaN and infinity, DiskError."""
    text = json.dumps(value, indent=2, allow_nan=False)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with disk(f"cannot write {path}", "make room there; what was trained is in the checkpoints"):
        try:
            with unfinished.open("w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
