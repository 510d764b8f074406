"""Optimizers by name; schedules by batch id, alike on every stage, whenever it gets there; and when a stage steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from dnipipe.config import Config

OptimizerFactory = Callable[[Iterable[Parameter]], torch.optim.Optimizer]
Schedule = Callable[[int], float]  # batch id, from 1 -> factor on the learning rate


def factory(config: Config) -> OptimizerFactory:
    """What makes a stage's optimizer out of its parameters."""
    settings = config.optimizer
    if settings.name == "sgd":
        return lambda parameters: torch.optim.SGD(
            parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam}[settings.name]
    betas = settings.beta1, 0.999
    return lambda parameters: kind(parameters, settings.lr, betas, weight_decay=settings.weight_decay)


def schedule(config: Config, total: int) -> Schedule:
    """Rise linearly over optimizer.warmup batches; then stay, fall towards 0 (linearly, as a cosine), or fall in steps.

    The last batch, `total`, still counts; 0 is where the next one would be. A step is to a tenth, behind each batch of
    optimizer.drops.
    """
    kind, warmup, drops = config.optimizer.schedule, config.optimizer.warmup, config.optimizer.drops

    def factor(batch: int) -> float:
        if batch <= warmup:
            return batch / (warmup + 1)
        done = (batch - 1 - warmup) / max(1, total - warmup)
        if kind == "linear":
            return max(0.0, 1.0 - done)
        if kind == "steps":
            return float(0.1 ** sum(batch > drop for drop in drops))
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))) if kind == "cosine" else 1.0

    return factor


class Descent:
    """A stage's optimizer: on which batches it steps, and how far.

    Args:
        optimizer: of the stage's parameters.
        schedule: batch id -> factor on its learning rates.
        clip: largest norm of the gradient; 0 is no limit.
        accumulate: M, batches whose gradients, averaged, make one update. Ids decide where one ends, so the parameters'
            grad is all that a checkpoint in the middle of an update has to keep. (A batch skipped there lets what was
            gathered wait for the next such id.)
        reschedule: S, batches over which an update that comes τ updates late has its rate multiplied by τ^-(1 - id/S):
            lr/τ at the start, lr from batch S on (PipeMare, arXiv:1910.05124, T1).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule = lambda batch: 1.0,
        clip: float = 0.0,
        accumulate: int = 1,
        reschedule: int = 0,
    ) -> None:
        self.optimizer, self.schedule, self.clip = optimizer, schedule, clip
        self.accumulate, self.reschedule = accumulate, reschedule
        self._base_lr = [group["lr"] for group in optimizer.param_groups]

    def step(self, batch: int, late: int = 0) -> bool:
        """Update with what is in the parameters' grad, the batch's own included, unless more is to come: was it done?

        late: how many updates this stage made between the batch's forward and now.
        """
        if batch % self.accumulate:
            return False
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.accumulate > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.accumulate
        if self.clip:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        factor = self.schedule(batch) * self._slowed(batch, late)
        for group, lr in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def join(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: float) -> None:
        """Let these gradients, so much of each, take part in the next update."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(gradient, alpha=weight)

    def _slowed(self, batch: int, late: int) -> float:
        return float(late ** (batch / self.reschedule - 1.0)) if late > 1 and batch < self.reschedule else 1.0
