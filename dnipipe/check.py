"""`dnipipe check`: one batch through all stages in one process, and the plan it shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from dnipipe.building import Job, build_stage, first_batch, plan_for, total_batches
from dnipipe.config import WireSettings, under
from dnipipe.messages import Activation, Gradient, Message
from dnipipe.metrics import StageMetrics
from dnipipe.pairs import parted
from dnipipe.result import table
from dnipipe.split import Plan
from dnipipe.stage import Stage
from dnipipe.sync import microbatches
from dnipipe.unlocked import UnlockedStage
from dnipipe.wire import form_of

REPEATS = 6  # batches, so that the cost of a first one does not count for much


def check(job: Job) -> Iterator[str]:
    """The plan, line by line: what is cut where, shapes and bytes on each edge, parameters, the predictors' cost."""
    settings, task = job.config, job.task()
    x, y = first_batch(task)
    h, along = parted(x)
    torch.manual_seed(settings.train.seed)
    model = job.model()
    plan = plan_for(job, model, x, y, task.classes)
    total = total_batches(settings, task)
    if settings.rule.name == "sync":  # in one process there is no schedule: the same layers, in turn
        job = replace(job, config=under(settings, "wait"))
        count = microbatches(settings.sync, plan.stages, plan.x[0])
        yield f"sync    {settings.sync.schedule}: {count} micro-batches of {plan.x[0] // count} samples"
    measured = [StageMetrics(k, plan.stages) for k in range(plan.stages)]
    stages = [build_stage(job, model, plan, k, total, measured[k]) for k in range(plan.stages)]
    for batch in range(1, 1 + REPEATS):
        one_batch(stages, Activation(batch, h, y, along=along))
    yield f"data    {task.corpus}; {len(task.train)} batches an epoch, {total} to train"
    yield from table(settings, plan)
    for k, stage in enumerate(stages[:-1]):
        yield _edge(settings.wire, plan, k) + _predictor(stage, measured[k]) + _inputs(stages[k + 1], plan)
    yield f"rule    {settings.rule.name}: {REPEATS} batches went through all stages in one process"


def one_batch(stages: list[Stage], first: Activation) -> None:
    """Drive one batch through all stages, in turns: down with its activations, up with its gradients."""
    inbox: list[tuple[int, Message]] = [(0, first)]
    while inbox:
        k, message = inbox.pop(0)
        for out in stages[k].handle(message):
            inbox.append((k - 1, out) if isinstance(out, Gradient) else (k + 1, out))


def _edge(wire: WireSettings, plan: Plan, k: int) -> str:
    edge = f"edge {k} → {k + 1}  {_tensor(*plan.h(k))}"
    if along := plan.along(k):
        edge += f" (and {_tensor(*along)} along with it, down only)"
    if not wire.changes:
        return f"{edge} a batch each way"
    few = f", one in {wire.gradient_every}" if wire.gradient_every > 1 else ""
    dtype, (samples, *shape) = plan.h(k)
    some = math.ceil(wire.gradient_rows * samples)
    down, up = (_travels(way, dtype, (n, *shape)) for way, n in ((wire.activations, samples), (wire.gradients, some)))
    return f"{edge} a batch in a stage; on the wire activations {down}, gradients {up}{few}"


def _travels(setting: str, dtype: str, shape: tuple[int, ...]) -> str:
    form = form_of(setting, getattr(torch, dtype))
    size = form.size(shape) if form else _size(dtype, shape)
    return f"{setting if form else 'as they are'} {size / 1024:.4g} KiB"


def _tensor(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}, {_size(dtype, shape) / 1024:.0f} KiB"


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes."""
    itemsize: int = getattr(torch, dtype).itemsize
    return itemsize * torch.Size(shape).numel()


def _inputs(stage: Stage, plan: Plan) -> str:
    if not isinstance(stage, UnlockedStage) or stage.inputs is None:
        return ""
    count = sum(p.numel() for p in stage.inputs.net.parameters())
    return f"; and x {_tensor(plan.x_dtype, plan.x)}, from which {count:,} parameters guess stage {stage.index}'s input"


def _predictor(stage: Stage, measured: StageMetrics) -> str:
    if stage.rule.learner is None:
        return ""
    seconds = measured.clock.seconds()
    work = sum(seconds.get(label, 0.0) for label in ("forward", "backward", "predictor", "optimizer"))
    count = sum(p.numel() for p in stage.rule.learner.predictor.parameters())
    share = seconds.get("predictor", 0.0) / work
    return f"; predictor {count:,} parameters; predicting took {share:.0%} of stage {stage.index}'s time"
