"""Optimizers by name, and learning-rate schedules by batch id: the same on every stage, whenever it gets there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
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
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return lambda parameters: kind(parameters, settings.lr, weight_decay=settings.weight_decay)


def schedule(config: Config, total: int) -> Schedule:
    """Rise linearly over optimizer.warmup batches; then stay, or fall (linearly, as a cosine) towards 0.

    The last batch, `total`, still counts; 0 is where the next one would be.
    """
    kind, warmup = config.optimizer.schedule, config.optimizer.warmup

    def factor(batch: int) -> float:
        if batch <= warmup:
            return batch / (warmup + 1)
        done = (batch - 1 - warmup) / max(1, total - warmup)
        if kind == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))) if kind == "cosine" else 1.0

    return factor
