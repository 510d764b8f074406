"""The same work in a bare loop: the whole model by plain autograd, or one stage with its gradient at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dnipipe import split
from dnipipe.building import device_of, plan_for
from dnipipe.config import load
from dnipipe.execution import round_off, rounded
from dnipipe.jobs import job_of

SECONDS = 2.0  # of a loop
CONFIG = Path(__file__).with_name("lm.toml")


@dataclass(frozen=True)
class Loop:
    rate: float  # samples/s, median
    memory: float  # MiB


def loop(words: tuple[str, ...], stage: int | None, repeats: int) -> Loop:
    """Stage 0 or 1 of the benchmark's model, or all of it (None); batches come from the main memory, as in a run."""
    config = load(CONFIG, words)
    job, device = job_of(config), device_of(config)
    batches = list(islice(chain.from_iterable(repeat(job.task().train)), 20))
    x, y = batches[0]
    plan = plan_for(job, job.model(), x, y, None)
    torch.manual_seed(0)
    model = job.model() if stage is None else split.part(job.model(), plan, stage)
    module = round_off(model.to(device), config.pipeline, device)
    optimizer = job.optimizer([p for p in module.parameters() if p.requires_grad])
    loss = rounded(job.loss, config.pipeline, device)
    h = torch.randn(plan.edge(0).h, device=device)
    g = h / y.numel()

    def step(x: Tensor, y: Tensor) -> None:
        x = h.detach().requires_grad_() if stage == 1 else x.to(device)
        out = module(x)
        if stage == 0:
            out.backward(g)
        else:
            loss(out, y.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rates = [_rate(step, batches) for _ in range(1 + repeats)][1:]
    return Loop(median(rates), torch.cuda.max_memory_allocated() / 2**20)


def _rate(step: Callable[[Tensor, Tensor], None], batches: list[tuple[Tensor, Tensor]]) -> float:
    torch.cuda.synchronize()
    done, began = 0, time.monotonic()
    while time.monotonic() - began < SECONDS:
        for x, y in batches:
            step(x, y)
            done += x.shape[0]
        torch.cuda.synchronize()
    return done / (time.monotonic() - began)


__all__ = ["CONFIG", "Loop", "loop"]
