"""What a stage measures about itself: sums of a run and of the time since the last reading.

Tensors are kept as tensors until a number is asked for, so that no device is waited for in the hot loop.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dnipipe.likeness import dots, likeness
from dnipipe.metrics.clock import LABELS, Clock, spending
from dnipipe.metrics.memory import memory, peak_memory

FOLD = 256  # gradients whose dot products are kept one by one
COMPARED = 4  # one gradient in so many is compared with its prediction: it costs a tenth of a millisecond


@dataclass
class _Sums:
    """What is added up. Python's floats: a float32 sum stops growing after some millions of batches."""

    batches: int = 0
    samples: int = 0
    at_once: int = 0  # batches on which the stage updated before it had their gradient
    arrived: int = 0  # gradients
    staleness: int = 0
    compared: float = 0.0  # of the gradients that arrived, those that have a likeness
    cosine: float = 0.0
    ratio: float = 0.0
    terms: int = 0
    loss: float = 0.0
    inputs: float = 0.0  # of the activations whose guess was trained on, those that have an error
    input_error: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(_Sums)))

    def means(self) -> dict[str, float]:
        """Only what was measured."""
        found: dict[str, float] = {}
        if self.batches:
            found["at_once"] = self.at_once / self.batches
        if self.arrived:
            found["staleness"] = self.staleness / self.arrived
        if self.compared:
            found |= {"cosine": self.cosine / self.compared, "norm_ratio": self.ratio / self.compared}
        if self.terms:
            found["loss"] = self.loss / self.terms
        if self.inputs:
            found["input_error"] = self.input_error / self.inputs
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
        self.dropped: Counter[str] = Counter()  # what the transport did not let in, by reason; its owner sets it
        self.unlearnt = 0  # gradients that the predictor had no time for
        self._evaluations: deque[dict[str, float]] = deque()  # that no reading has yet: a line has room for one
        self._all, self._lately = _Sums(), _Sums()  # before the last reading, and since
        self._uncompared = 0  # gradients still to come before the next that is compared
        self._dots: list[Tensor] = []  # (3,) each, one a gradient, not yet in the next line's sum
        self._likeness: Tensor | float = 0.0  # (3,) sums since the last reading, of `_summed`
        self._loss: Tensor | float = 0.0  # 0-dim sum since the last reading
        self._terms: Tensor | int = 0  # the same
        self._inputs: Tensor | float = 0.0  # (2,) sum since the last reading, of `unexplained`
        self._before = self.clock.seconds(), self.clock.processor()
        self._began = self._until = self.clock.now()  # of the run; the last batch was trained
        self._evaluations_took = 0.0  # those with a batch behind them
        self._evaluating: tuple[float, float] | None = None  # from when to when, since the last batch

    def begin(self) -> None:
        """The run starts here: what lies before (waiting for the neighbours to come up) is nobody's time."""
        self.clock.restart()
        self._before = self.clock.seconds(), self.clock.processor()
        self._began = self._until = self.clock.now()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around the forward of an evaluation. Between two of one evaluation there is no training to be measured."""
        began = self._evaluating[0] if self._evaluating else self.clock.now()
        with self.clock.span("evaluation"):
            yield
        self._evaluating = began, self.clock.now()

    @property
    def training_seconds(self) -> float:
        """From the start to the last batch, evaluations left out."""
        return self._until - self._began - self._evaluations_took

    def trained(self, batch: int, samples: int, at_once: bool = True) -> None:
        self._until = self.clock.now()
        if self._evaluating:
            self._evaluations_took += self._evaluating[1] - self._evaluating[0]
            self._evaluating = None
        self._lately.batches += 1
        self._lately.at_once += at_once
        self._lately.samples += samples

    def loss(self, value: Tensor, terms: Tensor | int) -> None:
        """The mean loss of one batch (0-dim, detached) over so many terms; both are kept as tensors."""
        self._loss = self._loss + value.float() * terms  # a sum in half precision would soon stop growing
        self._terms = self._terms + terms

    def received(self, predicted: Tensor | None, g: Tensor, staleness: int) -> None:
        """A gradient came, after so many updates; one in COMPARED is held against the predicted one. Both (B, D...)."""
        self._lately.arrived += 1
        self._lately.staleness += staleness
        self._uncompared -= 1
        if predicted is not None and self._uncompared < 0:
            self._uncompared = COMPARED - 1
            with self.clock.span("report"):
                self._dots.append(dots(predicted, g))
                if len(self._dots) >= FOLD:
                    self._fold()

    def input_guessed(self, guessed: Tensor, h: Tensor) -> None:
        """What the stage trained on as its input, and what really came. Both (B, D...)."""
        self._inputs = self._inputs + unexplained(guessed, h)

    def skip(self, reason: str) -> None:
        self.skipped[reason] += 1

    def evaluated(self, batch: int, loss: float, accuracy: float | None) -> None:
        """Of the model as it was after `batch`: on a slow link its answers come many batches later."""
        found = {"eval.batch": float(batch), "eval.loss": loss}
        self._evaluations.append(found | ({} if accuracy is None else {"eval.accuracy": accuracy}))

    @property
    def unread(self) -> int:
        """Evaluations that are in no line yet."""
        return len(self._evaluations)

    def numbers(self, pending: int, window: int) -> dict[str, float]:
        """What happened since the last call, for a line of metrics. Absent: not measured, or not finite."""
        self._read()
        after, lately = (self.clock.seconds(), self.clock.processor()), self._lately
        spent = spending(*({k: b[k] - a[k] for k in LABELS} for a, b in zip(self._before, after, strict=True)))
        found = {
            "stage": self.stage,
            "batches": lately.batches,
            "samples": lately.samples,
            "samples_per_second": lately.samples / spent["seconds"] if spent["seconds"] > 0 else 0.0,
            **lately.means(),
            **(self._evaluations.popleft() if self._evaluations else {}),
            "in_flight": pending,
            "window": window,
            "skipped": self.skipped.total(),
            "dropped": self.dropped.total(),
            "unlearnt": self.unlearnt,
            **spent,
        }
        if (now := memory()) is not None:
            found["memory"] = now
        self._before, self._all, self._lately = after, self._all + lately, _Sums()
        return _finite(found)

    def totals(self) -> dict[str, float]:
        """The whole run, as flat numbers; `skipped.REASON`, `dropped.REASON` count one reason. Absent: not measured, or
        not finite."""
        self._read()
        every = self._all + self._lately
        found = {**spending(self.clock.seconds(), self.clock.processor()), **every.means()}
        found |= {"batches": every.batches, "samples": every.samples, "skipped": self.skipped.total()}
        found |= {"unlearnt": self.unlearnt}
        found |= {"training_seconds": self.training_seconds, "peak_memory": peak_memory()}
        counts = {"skipped": self.skipped, "dropped": self.dropped}
        found |= {f"{name}.{reason}": n for name, count in counts.items() for reason, n in list(count.items())}
        return _finite(found)

    def _fold(self) -> None:
        """Many gradients at once, for small operations on tensors are dear one by one."""
        if self._dots:
            self._likeness = self._likeness + _summed(torch.stack(self._dots))
            self._dots = []

    def _read(self) -> None:
        """The tensors of this interval become numbers: the only place that waits for a device."""
        self._fold()
        if isinstance(self._likeness, Tensor):
            cosine, ratio, compared = self._likeness.tolist()
            self._lately += _Sums(cosine=cosine, ratio=ratio, compared=compared)
        if isinstance(self._inputs, Tensor):
            error, inputs = self._inputs.tolist()
            self._lately += _Sums(input_error=error, inputs=inputs)
        self._lately += _Sums(loss=float(self._loss), terms=int(self._terms))
        self._likeness = self._loss = self._inputs = 0.0
        self._terms = 0


def _summed(rows: Tensor) -> Tensor:
    """(N, 3) rows of `dots` to (3,) sums: of cosines, of |ĝ| / |g|, and how many rows have both."""
    cosines, ratios = likeness(rows)
    found = torch.stack([cosines, ratios, torch.ones_like(cosines)], dim=1)
    return torch.where(found.isfinite().all(dim=1, keepdim=True), found, torch.zeros_like(found)).sum(dim=0)


def unexplained(guessed: Tensor, h: Tensor) -> Tensor:
    """(2,): ‖ĥ − h‖² / ‖h − h̄‖², h̄ the batch's mean, and 1 for one such number. Both zero if it is not finite.

    So 0 is an exact guess, and 1 is no better than to know the mean. Both are (B, D...).
    """
    h, guessed = h.float(), guessed.float()
    error = (guessed - h).square().sum() / (h - h.mean(0)).square().sum()
    found = torch.stack([error, torch.ones_like(error)])
    return torch.where(error.isfinite(), found, torch.zeros_like(found))


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    """JSON knows no NaN and no infinity; a line without the number says that there is none."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
