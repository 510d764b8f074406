"""One rank of a synchronous pipeline (torch.distributed.pipelining) of the same stages; and a stage alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import chain, repeat

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from benchmarks.throughput.window import Window
from benchmarks.throughput.workload import Workload
from dnipipe.building import Job, plan_for

LIMIT = timedelta(seconds=300)  # of any wait for another rank
WARM_UP = 1  # steps that are not counted


def pipeline(workload: Workload, schedule: str, microbatches: int, seconds: float, window: Window) -> None:
    """Train for about so many seconds; the window is opened after the warm-up and closed after the last step.

    gpipe, 1f1b: a stage a rank. interleaved: two, stage k and k + K, each half as large. plain: one micro-batch at a
    time, so that one rank works and the others wait: plain model parallelism.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=LIMIT)
    try:
        config = workload.config()
        job = workload.job(config)
        parts = _parts(job, rank, world, 2 if schedule == "interleaved" else 1)
        stages = [PipelineStage(part, index, count, torch.device("cpu")) for index, count, part in parts]
        engine = _schedule(schedule, stages, 1 if schedule == "plain" else microbatches, job)
        descent = job.optimizer([p for _, _, part in parts for p in part.parameters()])
        batches = _batches(job, 1 if schedule == "plain" else microbatches)
        first, last = rank == 0, rank == world - 1

        def step() -> None:
            x, y = next(batches)
            losses: list[Tensor] = []
            given, wanted = ((x,) if first else ()), (y if last else None)
            engine.step(*given, target=wanted, losses=losses if last else None)
            descent.step()
            descent.zero_grad()

        for _ in range(WARM_UP):
            began = time.monotonic()
            step()
        steps = _agreed(max(1, round(seconds / (time.monotonic() - began))))
        dist.barrier()
        window.open()
        for _ in range(steps):
            step()
        window.close(steps * config.data.batch * (1 if schedule == "plain" else microbatches))
    finally:
        dist.destroy_process_group()


def alone(workload: Workload, index: int, seconds: float, window: Window) -> None:
    """Stage `index` in a loop by itself, its input at hand and the gradient of its output known: the limit."""
    config = workload.config()
    job = workload.job(config)
    ((_, _, module),) = _parts(job, index, workload.stages, 1)
    descent = job.optimizer(module.parameters())
    x, y = next(_batches(job, 1))
    plan = plan_for(job, job.model(), x, y, None)
    if index > 0:
        x = torch.randn(plan.edge(index - 1).h)
    g = None if index == workload.stages - 1 else torch.randn(plan.edge(index).h) / y.numel()
    x.requires_grad_(index > 0)

    def step() -> None:
        h = module(x)
        if g is None:
            job.loss(h, y).backward()  # type: ignore[no-untyped-call]
        else:
            h.backward(g)
        descent.step()
        descent.zero_grad()
        x.grad = None

    for _ in range(3):
        step()
    window.open()
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        step()
        done += 1
    window.close(done * config.data.batch)


def _parts(job: Job, rank: int, world: int, each: int) -> list[tuple[int, int, nn.Module]]:
    """(index, their number, layers) of the rank's stages: rank, rank + world, …"""
    model, count = job.model(), each * world
    layers = len(list(model.children()))
    bounds = job.config.pipeline.boundaries
    if each > 1:  # the blocks alike; the embedding with the first, the output with the last
        bounds = tuple(1 + (layers - 2) * k // count for k in range(1, count))
    edges = (0, *bounds, layers)
    children = list(model.named_children())
    found: list[tuple[int, int, nn.Module]] = []
    for index in range(rank, count, world):
        part = nn.Sequential()
        for name, layer in children[edges[index] : edges[index + 1]]:
            part.add_module(name, layer)
        found.append((index, count, part))
    return found


def _schedule(
    name: str, stages: list[PipelineStage], microbatches: int, job: Job
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    if name == "interleaved":
        return ScheduleInterleaved1F1B(stages, microbatches, loss_fn=job.loss)  # type: ignore[arg-type]
    if name not in ("1f1b", "gpipe", "plain"):
        raise ValueError(f"no such schedule: {name}")
    kind = Schedule1F1B if name == "1f1b" else ScheduleGPipe
    return kind(stages[0], microbatches, loss_fn=job.loss)


def _batches(job: Job, microbatches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) of so many micro-batches each, for ever. Every rank draws the same; a shorter last one is left out."""
    torch.manual_seed(job.config.train.seed)
    task, whole = job.task(), job.config.data.batch
    full = (pair for pair in chain.from_iterable(repeat(task.train)) if pair[0].shape[0] == whole)
    while True:
        pairs = [next(full) for _ in range(microbatches)]
        yield torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _agreed(steps: int) -> int:
    """The largest of all ranks' numbers."""
    count = torch.tensor(steps)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count)


__all__ = ["alone", "pipeline"]
