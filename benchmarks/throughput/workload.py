"""What is trained: the same stages for every system, of real layers, or with their computation emulated."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe import data, models, optim
from dnipipe.building import Job
from dnipipe.config import Config, load
from dnipipe.data import Task

CONFIG = Path(__file__).with_name("lm.toml")
BLOCKS = 2  # a stage; a schedule with two stages a process has one each
CLASSES, FEATURES = 16, 64  # of the emulated stages, where nothing else is asked for


@dataclass(frozen=True)
class Workload:
    """Args:
    stages: K.
    sleep: 0, or seconds that a stage's forward and backward take together, without a processor: for more stages than
        there are cores. A third of it is the forward's.
    slow: stage -> how many times slower it is than the others. features: D, of what passes between them, float32. Both
        with `sleep` only.
    """

    stages: int
    sleep: float = 0.0
    slow: tuple[tuple[int, float], ...] = ()
    features: int = FEATURES

    def config(self, *words: str) -> Config:
        """The settings of a run, `words` on top."""
        blocks = self.stages * BLOCKS
        first, step = (1 + BLOCKS, BLOCKS) if self.sleep == 0 else (1, 1)  # the embedding belongs to stage 0
        cut = ",".join(str(first + step * k) for k in range(self.stages - 1))
        shape = ("--model.layers", str(blocks), "--pipeline.stages", str(self.stages))
        return load(CONFIG, (*shape, *(("--pipeline.boundaries", cut) if cut else ()), *words))

    def job(self, config: Config) -> Job:
        """For dnipipe; each other system takes its parts."""
        loss, optimizer = models.cross_entropy, optim.factory(config)
        return Job(config, lambda: self.model(config), loss, optimizer, lambda: self.task(config))

    def model(self, config: Config) -> nn.Sequential:
        torch.manual_seed(config.train.seed)
        if self.sleep == 0:
            return models.build(config)
        slow = dict(self.slow)
        stages: list[nn.Module] = [Paced(self.features, self.sleep * slow.get(k, 1.0)) for k in range(self.stages)]
        stages[-1] = nn.Sequential(stages[-1], nn.Linear(self.features, CLASSES))
        return nn.Sequential(OrderedDict((f"stage{k}", stage) for k, stage in enumerate(stages)))

    def task(self, config: Config) -> Task:
        if self.sleep == 0:
            return data.load(config)
        x, y = torch.randn(config.data.batch, self.features), torch.randint(CLASSES, (config.data.batch,))
        return Task([(x, y)] * 1000, None, CLASSES, "emulated computation", None, None)


class Paced(nn.Module):
    """A weight for each feature, (B, D) to (B, D), whose forward and backward take so many seconds together, asleep."""

    def __init__(self, features: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = _Sleep.apply(self.weight * x, self.seconds)  # type: ignore[no-untyped-call]
        return h


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds / 3)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds * 2 / 3)
        return g, None
