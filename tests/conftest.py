"""What several tests need: small stages, and a line of them in one process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe.gradient_rules import GradientRule
from dnipipe.last_stage import LossGradient
from dnipipe.learner import Learner
from dnipipe.messages import Activation, Checkpoint, Evaluation, Input, Message
from dnipipe.metrics import StageMetrics
from dnipipe.optim import Descent
from dnipipe.predictors import VFBN
from dnipipe.stage import Stage

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

SMALL: dict[str, object] = {  # settings of a run so small that its start is most of it
    "data.limit": 40_000,
    "data.batch": 8,
    "data.context": 16,
    "data.validation": 0.05,
    "model.width": 16,
    "model.heads": 2,
    "optimizer.schedule": "constant",  # a run that is cut short has the rates of the whole one
}
STEPPING = ("schedule", "clip", "accumulate", "reschedule", "lookahead")  # the options that are Descent's


class Line:
    """K stages in one process, their messages in queues: each stage takes one message in turn, the last stage first.

    `delay` holds every gradient back for so many rounds. What reaches the head is in `taken`.
    """

    def __init__(self, stages: Sequence[Stage], delay: int = 0) -> None:
        self.stages, self.delay = stages, delay
        self.down: list[deque[Message]] = [deque() for _ in stages]
        self.up: list[deque[tuple[int, Message]]] = [deque() for _ in stages]
        self.taken: list[Message] = []
        self.log: list[str] = []
        self.round = 0

    def feed(self, *messages: Message) -> None:
        self.down[0].extend(messages)

    def send(self, k: int, message: Message) -> None:
        self.log.append(f"{k} {type(message).__name__} {getattr(message, 'batch', '')}".strip())
        if isinstance(message, (Activation, Input, Evaluation, Checkpoint)):
            self.down[k + 1].append(message)
        elif k == 0:
            self.taken.append(message)
        else:
            self.up[k - 1].append((self.round + self.delay, message))

    def run(self) -> Line:
        """Until every queue is empty."""
        while any(self.down) or any(self.up):
            self.round += 1
            for k in reversed(range(len(self.stages))):
                while self.up[k] and self.up[k][0][0] <= self.round:
                    self._handle(k, self.up[k].popleft()[1])
                if self.down[k]:
                    self._handle(k, self.down[k].popleft())
        return self

    def _handle(self, k: int, message: Message) -> None:
        for out in self.stages[k].handle(message):
            self.send(k, out)


def make_stages(
    modules: list[nn.Module],
    rule: Callable[[int], GradientRule],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    kind: Callable[[int], Callable[..., Stage]] = lambda k: Stage,
    **options: object,
) -> list[Stage]:
    """Stages of these modules; `rule(k)` for all but the last, which has the loss. Options: Stage's and Descent's.

    `kind(k)` makes stage k: what is called as Stage is.
    """
    made, count = [], len(modules)
    teaches = rule(0).teaches if count > 1 else True
    for k, module in enumerate(modules):
        metrics = StageMetrics(k, count)
        own = rule(k) if k < count - 1 else LossGradient(loss, teaches, metrics.loss, bool(options.get("stop", True)))
        ours = {name: value for name, value in options.items() if name not in ("stop", *STEPPING)}
        stepping = {name: value for name, value in options.items() if name in STEPPING}
        descent = Descent(optimizer(list(module.parameters())), **stepping)  # type: ignore[arg-type]
        stop = bool(options.get("stop", True))
        made.append(kind(k)(k, count, module, own, descent, metrics, loss=loss, skips_nan=not stop, **ours))
    return made


def narrow() -> tuple[list[nn.Module], list[Learner]]:
    """Three stages, and what teaches the first two: a random first layer of 2 features cannot tell the blobs apart."""
    torch.manual_seed(3)
    modules: list[nn.Module] = [
        nn.Sequential(nn.Linear(8, 2), nn.Tanh()),
        nn.Sequential(nn.Linear(2, 8), nn.Tanh()),
        nn.Linear(8, 3),
    ]
    torch.manual_seed(1)
    return modules, [Learner(VFBN(nn.Linear(n, 3), F.cross_entropy, 0.1), 3e-3) for n in (2, 8)]


def blobs(
    batches: int, size: int = 16, features: int = 8, classes: int = 3, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """A small classification task: which of `classes` fixed centres is the sample near."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=generator)
    for _ in range(batches):
        y = torch.randint(classes, (size,), generator=generator)
        yield centres[y] + 0.5 * torch.randn(size, features, generator=generator), y
