"""Numbers about one stage: where its time goes, how good its synthetic gradient is; and the files they go to.

Every second of a process has one owner, by construction: the innermost open span of the clock, and outside of all spans
"overhead". Tensors are kept as tensors until a number is asked for, so that no device is waited for in the hot loop.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dnipipe.errors import ConfigError

WORK = ("forward", "backward", "predictor", "optimizer", "data", "checkpoint")  # what a stage is there for
OVERHEAD = ("send", "receive", "overhead")  # what the pipeline costs on top
LABELS = (*WORK, "idle", *OVERHEAD)
FOLD = 256  # gradients whose dot products are kept one by one


class _Span:
    """`with clock.span(label)`: the time belongs to label, and then again to whom it belonged before."""

    def __init__(self, clock: Clock, label: str) -> None:
        self.clock, self.label, self.outer = clock, label, list[str]()
        self.entered = 0  # times

    def __enter__(self) -> None:
        self.entered += 1
        self.outer.append(self.clock.switch(self.label))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clock.switch(self.outer.pop())


class Clock:
    """Accounts for every second: `seconds()` adds up to the time since the clock was made, exactly.

    So does `processor()` for the seconds that this thread had a processor. The two differ where more processes run
    than there are cores: one that is set aside in the middle of a send has not spent that time on sending.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, worked: Callable[[], float] = time.thread_time
    ) -> None:
        self.now, self.worked = now, worked
        self._owner, self._since, self._worked_since = "overhead", now(), worked()
        self._seconds = dict.fromkeys(LABELS, 0.0)
        self._processor = dict.fromkeys(LABELS, 0.0)
        self._spans = {label: _Span(self, label) for label in LABELS}

    def span(self, label: str) -> _Span:
        return self._spans[label]

    def switch(self, label: str) -> str:
        """Give the time from now on to `label`; returns whose it was."""
        now, worked = self.now(), self.worked()
        before = self._owner
        self._seconds[before] += now - self._since
        self._processor[before] += worked - self._worked_since
        self._owner, self._since, self._worked_since = label, now, worked
        return before

    def seconds(self) -> dict[str, float]:
        self.switch(self._owner)
        return dict(self._seconds)

    def processor(self) -> dict[str, float]:
        self.switch(self._owner)
        return dict(self._processor)


@dataclass
class _Sums:
    """What is added up. Python's floats: a float32 sum stops growing after some millions of batches."""

    batches: int = 0
    samples: int = 0
    arrived: int = 0  # gradients
    staleness: int = 0
    compared: float = 0.0  # of the gradients that arrived, those that have a likeness
    cosine: float = 0.0
    ratio: float = 0.0
    terms: int = 0
    loss: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(_Sums)))

    def means(self) -> dict[str, float]:
        """Only what was measured."""
        found: dict[str, float] = {}
        if self.arrived:
            found["staleness"] = self.staleness / self.arrived
        if self.compared:
            found |= {"cosine": self.cosine / self.compared, "norm_ratio": self.ratio / self.compared}
        if self.terms:
            found["loss"] = self.loss / self.terms
        return found


class StageMetrics:
    """What one stage measures about itself.

    Args:
        stage, stages: k and K.
        clock: where the time goes.
    """

    def __init__(self, stage: int, stages: int, clock: Clock | None = None) -> None:
        self.stage, self.stages = stage, stages
        self.clock = clock or Clock()
        self.skipped: Counter[str] = Counter()
        self._evaluation: dict[str, float] = {}  # since the last reading
        self._all, self._lately = _Sums(), _Sums()  # before the last reading, and since
        self._dots: list[Tensor] = []  # (3,) each, one a gradient, not yet in the next line's sum
        self._likeness: Tensor | float = 0.0  # (3,) sums since the last reading, of `likeness`
        self._loss: Tensor | float = 0.0  # 0-dim sum since the last reading
        self._before = self.clock.seconds(), self.clock.processor()

    def begin(self) -> None:
        """The run starts here: what lies before (waiting for the neighbours to come up) is nobody's time."""
        self.clock = Clock(self.clock.now, self.clock.worked)
        self._before = self.clock.seconds(), self.clock.processor()

    def trained(self, batch: int, samples: int) -> None:
        self._lately.batches += 1
        self._lately.samples += samples

    def loss(self, value: Tensor, terms: int) -> None:
        """The mean loss of one batch (0-dim, detached, kept as a tensor) over so many terms."""
        self._loss = self._loss + value.float() * terms  # a sum in half precision would soon stop growing
        self._lately.terms += terms

    def received(self, predicted: Tensor | None, g: Tensor, staleness: int) -> None:
        """A gradient came, after so many updates: compare it with the predicted one. Both (B, D...)."""
        self._lately.arrived += 1
        self._lately.staleness += staleness
        if predicted is not None:
            self._dots.append(dots(predicted, g))
            if len(self._dots) >= FOLD:
                self._fold()

    def skip(self, reason: str) -> None:
        self.skipped[reason] += 1

    def evaluated(self, loss: float, accuracy: float | None) -> None:
        self._evaluation = {"eval.loss": loss} | ({} if accuracy is None else {"eval.accuracy": accuracy})

    def numbers(self, pending: int, window: int) -> dict[str, float]:
        """What happened since the last call, for a line of metrics. Absent: not measured, or not finite."""
        self._read()
        after, lately = (self.clock.seconds(), self.clock.processor()), self._lately
        spent = _shares(*({k: b[k] - a[k] for k in LABELS} for a, b in zip(self._before, after, strict=True)))
        found = {
            "stage": self.stage,
            "batches": lately.batches,
            "samples": lately.samples,
            "samples_per_second": lately.samples / spent["seconds"] if spent["seconds"] > 0 else 0.0,
            **lately.means(),
            **self._evaluation,
            "in_flight": pending,
            "window": window,
            "skipped": self.skipped.total(),
            **spent,
        }
        self._before, self._all, self._lately, self._evaluation = after, self._all + lately, _Sums(), {}
        return _finite(found)

    def totals(self) -> dict[str, float]:
        """The whole run, as flat numbers; `skipped.REASON` counts one reason. Absent: not measured, or not finite."""
        self._read()
        every = self._all + self._lately
        found = {**_shares(self.clock.seconds(), self.clock.processor()), **every.means()}
        found |= {"batches": every.batches, "samples": every.samples, "skipped": self.skipped.total()}
        return _finite(found | {f"skipped.{reason}": count for reason, count in self.skipped.items()})

    def _fold(self) -> None:
        """Many gradients at once, for small operations on tensors are dear one by one."""
        if self._dots:
            self._likeness = self._likeness + likeness(torch.stack(self._dots))
            self._dots = []

    def _read(self) -> None:
        """The tensors of this interval become numbers: the only place that waits for a device."""
        self._fold()
        if isinstance(self._likeness, Tensor):
            cosine, ratio, compared = self._likeness.tolist()
            self._lately += _Sums(cosine=cosine, ratio=ratio, compared=compared)
        self._lately.loss += float(self._loss)
        self._likeness = self._loss = 0.0


def dots(predicted: Tensor, g: Tensor) -> Tensor:
    """(3,) of two gradients (B, D...): ĝ·g, ĝ·ĝ, g·g, over the whole tensors."""
    wide = torch.promote_types(g.dtype, torch.float32)  # the squares of a float16 gradient would be zeros
    a, b = predicted.detach().flatten().to(wide), g.detach().flatten().to(wide)
    return torch.stack([torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)])


def likeness(rows: Tensor) -> Tensor:
    """(N, 3) rows of `dots` to (3,) sums: of cosines, of |ĝ| / |g|, and how many rows that is.

    Left out: where g is zero, or one of the two not finite. A prediction of zero, as the paper's predictors begin with,
    has cosine 0 and ratio 0.
    """
    length_a, length_b = rows[:, 1].sqrt(), rows[:, 2].sqrt()
    cosine = rows[:, 0] / length_b / length_a.clamp_min(torch.finfo(rows.dtype).tiny)
    found = torch.stack([cosine.clamp(-1, 1), length_a / length_b, torch.ones_like(cosine)], dim=1)
    return torch.where(found.isfinite().all(dim=1, keepdim=True), found, torch.zeros_like(found)).sum(dim=0)


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    """JSON knows no NaN and no infinity; a line without the number says that there is none."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _shares(spent: dict[str, float], worked: dict[str, float]) -> dict[str, float]:
    """Seconds by label, busy and idle; and the overhead, what the processor did that is not the model's, as two shares.

    overhead: of the stage's whole time. overhead_of_work: of the processor's time, what it does in a wait included, so
    the same however many processes share a core.
    """
    total, work = sum(spent.values()), sum(worked.values())
    own = sum(worked[label] for label in OVERHEAD)
    return {
        "seconds": total,
        "busy_seconds": total - spent["idle"],
        "idle_seconds": spent["idle"],
        "idle": spent["idle"] / total if total > 0 else 0.0,
        "overhead": own / total if total > 0 else 0.0,
        "overhead_of_work": (own + worked["idle"]) / work if work > 0 else 0.0,
        **{f"seconds.{label}": value for label, value in spent.items()},
        **{f"processor.{label}": value for label, value in worked.items()},
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
            raise ConfigError("output.tensorboard = true needs the extra: pip install 'dnipipe[tensorboard]'") from None
        self._writer: Any = SummaryWriter(str(folder))

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
    loss, accuracy = evaluation or (None, None)
    return {
        "stages": len(totals),
        "rule": rule,
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
        **{name: int(numbers[name]) for name in ("batches", "samples", "skipped")},
        **{name: numbers[name] for name in ("busy_seconds", "idle_seconds", "overhead", "overhead_of_work")},
        **{name: numbers.get(name) for name in ("cosine", "norm_ratio", "staleness")},
        "seconds": nested["seconds"],
        "processor": nested["processor"],
        "reasons": {reason: int(count) for reason, count in nested["skipped"].items()},
    }


def _or_null(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the whole new one. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, indent=2, allow_nan=False)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


__all__ = ["Clock", "JsonLines", "StageMetrics", "TensorBoard", "summary", "write_json"]
