"""Numbers about one stage: where its time goes, how good its synthetic gradient is; and the files they go to.

Every second of a process has one owner, by construction: the innermost open span of the clock, and outside of all spans
"overhead". Tensors are kept as tensors until a number is asked for, so that no device is waited for in the hot loop.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import zmq
from torch import Tensor

from dnipipe.errors import ConfigError

WORK = ("forward", "backward", "predictor", "optimizer", "data", "checkpoint")  # what a stage is there for
OVERHEAD = ("send", "receive", "overhead")  # what the pipeline costs on top
LABELS = (*WORK, "idle", *OVERHEAD)


class _Span:
    """`with clock.span(label)`: the time belongs to label, and then again to whom it belonged before."""

    def __init__(self, clock: Clock, label: str) -> None:
        self.clock, self.label, self.outer = clock, label, list[str]()

    def __enter__(self) -> None:
        self.outer.append(self.clock.switch(self.label))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clock.switch(self.outer.pop())


class Clock:
    """Accounts for every second: `seconds()` adds up to the time since the clock was made, exactly."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self._owner, self._since = "overhead", now()
        self._seconds = dict.fromkeys(LABELS, 0.0)
        self._spans = {label: _Span(self, label) for label in LABELS}

    def span(self, label: str) -> _Span:
        return self._spans[label]

    def switch(self, label: str) -> str:
        """Give the time from now on to `label`; returns whose it was."""
        now = self.now()
        self._seconds[self._owner] += now - self._since
        before, self._owner, self._since = self._owner, label, now
        return before

    def seconds(self) -> dict[str, float]:
        self.switch(self._owner)
        return dict(self._seconds)


class _Sums:
    """What is added up between two readings."""

    def __init__(self) -> None:
        self.batches = self.samples = self.arrived = self.terms = self.compared = 0
        self.staleness = 0.0
        self.cosine: Tensor | float = 0.0
        self.ratio: Tensor | float = 0.0
        self.loss: Tensor | float = 0.0

    def means(self) -> dict[str, float]:
        """Only what was measured, and only finite numbers."""
        found: dict[str, float] = {}
        if self.arrived:
            found["staleness"] = self.staleness / self.arrived
        if self.compared:
            found |= {"cosine": float(self.cosine) / self.compared, "norm_ratio": float(self.ratio) / self.compared}
        if self.terms:
            found["loss"] = float(self.loss) / self.terms
        return found


class StageMetrics:
    """What one stage measures about itself.

    Args:
        stage, stages: k and K.
        now: the clock's source, seconds.
    """

    def __init__(self, stage: int, stages: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.stage, self.stages = stage, stages
        self.clock = Clock(now)
        self.skipped: Counter[str] = Counter()
        self.evaluation: tuple[float, float | None] | None = None
        self._all, self._lately = _Sums(), _Sums()
        self._before = self.clock.seconds()

    def begin(self) -> None:
        """The run starts here: what lies before (waiting for the neighbours to come up) is nobody's time."""
        self.clock = Clock(self.clock.now)
        self._before = self.clock.seconds()

    def trained(self, batch: int, samples: int) -> None:
        for sums in (self._all, self._lately):
            sums.batches += 1
            sums.samples += samples

    def loss(self, value: Tensor, terms: int) -> None:
        """The mean loss of one batch (0-dim, kept as a tensor) over so many terms."""
        for sums in (self._all, self._lately):
            sums.loss = sums.loss + value * terms
            sums.terms += terms

    def received(self, predicted: Tensor | None, g: Tensor, staleness: int) -> None:
        """A gradient came, after so many updates: compare it with the predicted one. Both (B, D...)."""
        cosine = ratio = None
        if predicted is not None:
            a, b = predicted.flatten(), g.flatten()
            aa, bb = torch.dot(a, a).sqrt(), torch.dot(b, b).sqrt()
            tiny = torch.finfo(a.dtype).tiny
            cosine, ratio = torch.dot(a, b) / (aa * bb).clamp_min(tiny), aa / bb.clamp_min(tiny)
        for sums in (self._all, self._lately):
            sums.arrived += 1
            sums.staleness += staleness
            if cosine is not None and ratio is not None:
                sums.compared += 1
                sums.cosine, sums.ratio = sums.cosine + cosine, sums.ratio + ratio

    def skip(self, reason: str) -> None:
        self.skipped[reason] += 1

    def evaluated(self, loss: float, accuracy: float | None) -> None:
        self.evaluation = (loss, accuracy)

    def numbers(self, pending: int, window: int) -> dict[str, float]:
        """What happened since the last call, for a line of metrics."""
        seconds = self.clock.seconds()
        spent = {label: seconds[label] - self._before[label] for label in LABELS}
        found = {**_shares(spent), **self._lately.means(), "batches": self._lately.batches, "samples": self._lately.samples}
        found["samples_per_second"] = self._lately.samples / found["seconds"] if found["seconds"] > 0 else 0.0
        found |= {"in_flight": pending, "window": window, "skipped": self.skipped.total()}
        self._before, self._lately = seconds, _Sums()
        return found

    def totals(self) -> dict[str, float]:
        """The whole run, as flat numbers; `skipped.REASON` counts one reason. Absent: not measured."""
        found = {**_shares(self.clock.seconds()), **self._all.means()}
        found |= {"batches": self._all.batches, "samples": self._all.samples, "skipped": self.skipped.total()}
        return found | {f"skipped.{reason}": count for reason, count in self.skipped.items()}


def _shares(spent: dict[str, float]) -> dict[str, float]:
    """Seconds by label, busy and idle, and the overhead as a share of the busy time."""
    total = sum(spent.values())
    busy = total - spent["idle"]
    over = sum(spent[label] for label in OVERHEAD)
    return {
        "seconds": total,
        "busy_seconds": busy,
        "idle_seconds": spent["idle"],
        "idle": spent["idle"] / total if total > 0 else 0.0,
        "overhead": over / busy if busy > 0 else 0.0,
        **{f"seconds.{label}": value for label, value in spent.items()},
    }


# -- where the numbers go ----------------------------------------------------------------------------------------


class JsonLines:
    """One stage's numbers, a line a reading; a resumed run goes on with the same file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def write(self, batch: int, numbers: dict[str, float]) -> None:
        self._file.write(json.dumps({"time": time.time(), "batch": batch, **numbers}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """The same numbers for TensorBoard. Raises ConfigError if the extra is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("output.tensorboard = true needs an extra: pip install 'dnipipe[tensorboard]'") from None
        self._writer: Any = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def write(self, stage: int, batch: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(f"{name}/stage-{stage}", value, batch)

    def close(self) -> None:
        self._writer.close()


def summary(
    rule: str, seconds: float, evaluation: tuple[float, float | None] | None, totals: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """summary.json: its keys are fixed; null where nothing was measured.

    Args:
        seconds: spent on training, without evaluations. totals: those of stages 0 to K-1.
    """
    first = totals[0]
    return {
        "stages": len(totals),
        "rule": rule,
        "train": {
            "batches": first["batches"],
            "samples": first["samples"],
            "seconds": seconds,
            "samples_per_second": first["samples"] / seconds if seconds > 0 else 0.0,
        },
        "eval": {"loss": evaluation[0] if evaluation else None, "accuracy": evaluation[1] if evaluation else None},
        "stage": [_stage(index, numbers) for index, numbers in enumerate(totals)],
        "versions": {**_versions(), "torch": torch.__version__, "python": platform.python_version(), "pyzmq": zmq.__version__},
    }


def _stage(index: int, numbers: dict[str, float]) -> dict[str, Any]:
    measured = ("cosine", "norm_ratio", "staleness")
    known = ("batches", "busy_seconds", "idle_seconds", "overhead", "skipped")
    nested: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in numbers.items():
        if "." in name:
            nested[name.partition(".")[0]][name.partition(".")[2]] = value
    return {
        "index": index,
        **{name: numbers[name] for name in known},
        **{name: numbers.get(name) for name in measured},
        "seconds": nested["seconds"],
        "reasons": nested["skipped"],
    }


def _versions() -> dict[str, str]:
    try:
        return {"dnipipe": importlib.metadata.version("dnipipe")}
    except importlib.metadata.PackageNotFoundError:
        return {"dnipipe": "not installed"}


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the whole new one."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


__all__ = ["Clock", "JsonLines", "StageMetrics", "TensorBoard", "summary", "write_json"]
