"""`dnipipe verify`, `Run.verify`: K stages learn what one process with plain autograd learns, on this very model.

    sync     K processes, torch's own schedule         ─┐
    wait     K stages in one process, taking turns      ├─ the same batches ─► weights and buffers, name by name
    plain    one process, loss.backward()              ─┘

K processes take part in the first; the other two are stage 0's alone, which has the data and the model to begin with.
In float64, so that what is left is no rounding: in float32 Adam makes a whole step of a gradient that is zero but for
noise. What differs by nature is set aside, and said: dropout, for its masks depend on the cut; a limit on the norm of a
stage's gradient; what [wire] rounds or leaves out; micro-batches, where BatchNorm takes its statistics from them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dnipipe import checkpoint, config, laboratory, metrics, optim, session
from dnipipe.building import Job
from dnipipe.config import under
from dnipipe.data import Task, check_batch
from dnipipe.optim import Descent
from dnipipe.pairs import Given, first, joined, parted
from dnipipe.randomness import reseed

TOLERANCE = 1e-7  # of a difference, absolute and relative, after some tens of batches in float64
RESULT = "verify.json"  # in the folder of the run under sync: whether all is equal, and the lines that say so
WHY = {
    "wait": "a layer that keeps a state, or draws random numbers? Under wait a batch's forward is run twice",
    "sync": "a layer that keeps a state, draws random numbers or mixes samples, or a loss that is no mean over them? "
    "Under sync a batch goes through in parts",
}

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """What separates the weights and buffers of two runs."""

    largest: float
    where: str  # the name of what has it; "" if nothing differs at all
    first: str  # in the model's order, the first that is beyond the tolerance; "" if none is
    by: float  # its own largest


@dataclass(frozen=True)
class Prepared(Job):
    """A job as it can be held against plain autograd."""

    aside: tuple[str, ...] = ()  # `setting = value` of what it was given and is verified without


def prepared(job: Job, batches: int, run: Path) -> Prepared:
    """The job in float64, on `batches` batches of one shape, nothing random in it, nothing evaluated; under sync in the
    folder `run`. Where micro-batches would change what a layer computes, a batch is a single one."""
    settings = config.replace(
        under(job.config, "sync"),
        pipeline={"device": "cpu", "autocast": "off", "compile": False},
        optimizer={"clip": 0.0},
        train={"batches": batches},
        eval={"every": 0, "sample": 0},
        checkpoint={"every": 0},
        output={"run": str(run), "tensorboard": False, "quiet": True},
    )
    if _norms(job.model()):
        settings = config.replace(settings, sync={"schedule": "gpipe", "microbatches": 1})
    exact = replace(
        job,
        config=settings,
        model=lambda: _exact(job.model()),
        task=lambda: _first(job.task(), batches, settings.train.seed),
    )
    return Prepared(**vars(exact), aside=tuple(f"{name} = {value}" for name, value in job.config.wire.changed.items()))


def work(job: Job, resume: bool = False) -> Path:
    """This process's part in it, as session.work. Returns the run's folder, where stage 0 has left RESULT."""
    with contextlib.redirect_stdout(io.StringIO()):  # what a run says of itself is not asked for here
        run = session.work(job, resume)
        if os.environ["RANK"] == "0":
            metrics.write_json(run / RESULT, _compared(job, run))
    return run


def read(run: Path) -> tuple[bool, list[str]]:
    """Whether all is equal, and the lines that say so."""
    found = json.loads((run / RESULT).read_text())
    return found["equal"], found["lines"]


def _compared(job: Job, run: Path) -> dict[str, bool | list[str]]:
    settings, alone = job.config, run / "wait"
    waiting = config.replace(under(settings, "wait"), transport={"kind": "local"}, output={"run": str(alone)})
    laboratory.work(replace(job, config=waiting))
    reference = plain(job)
    schedule, count = settings.sync.schedule, settings.pipeline.stages
    found = {
        "wait": (f"{count} stages in one process", difference(checkpoint.weights(alone), reference)),
        "sync": (f"{count} processes, {schedule}", difference(checkpoint.weights(run), reference)),
    }
    lines = list(_conditions(job))
    for rule, (how, differing) in found.items():
        lines += _said(f"{rule:8}{how}: ", differing, WHY[rule])
    return {"equal": not any(differing.first for _, differing in found.values()), "lines": lines}


def _conditions(job: Job) -> list[str]:
    lines = [f"verify  {job.config.train.batches} batches in float64, without dropout and optimizer.clip"]
    if normed := _norms(job.model()):
        lines.append(
            f"        {normed[0]} is a BatchNorm{f' (and {len(normed) - 1} more)' * (len(normed) > 1)}, which sees one "
            "micro-batch at a time under sync, and so differs by nature: compared with one a batch"
        )
    if isinstance(job, Prepared) and job.aside:
        lines.append(f"        left aside: {', '.join(job.aside)}; what is rounded or missing differs by nature")
    return lines


def _said(what: str, found: Difference, why: str) -> list[str]:
    largest = f"largest difference {found.largest:.1e}" + (f", in {found.where}" if found.where else "")
    if not found.first:
        return [f"{what}equal to one process; {largest}"]
    return [f"{what}NOT equal to one process: first {found.first}, by {found.by:.1e}; {largest}", f"        {why}"]


def plain(job: Job) -> Weights:
    """One process, plain autograd."""
    settings, task = job.config, job.task()
    torch.manual_seed(settings.train.seed)
    model, total = job.model().train(), settings.train.batches
    trained = [p for p in model.parameters() if p.requires_grad]
    descent = Descent(job.optimizer(trained), job.schedule or optim.schedule(settings, total))
    for batch, (x, y) in enumerate(islice(cycle(task.train), total), start=1):
        given = first(Tensor.clone, x)  # a layer may write into it
        job.loss(model(given), y).backward()  # type: ignore[no-untyped-call]
        descent.step(batch)
    return dict(model.state_dict())


def difference(weights: Weights, reference: Weights, tolerance: float = TOLERANCE) -> Difference:
    """By name, in the reference's order. What is finite on one side only is beyond any tolerance."""
    largest, where, first, by = 0.0, "", "", 0.0
    for name, wanted in reference.items():
        off = (weights[name].double() - wanted.double()).abs()
        off = torch.where(weights[name] == wanted, torch.zeros_like(off), off.nan_to_num(nan=float("inf")))
        most = off.max().item() if off.numel() else 0.0
        if most > largest:
            largest, where = most, name
        if not first and bool((off > tolerance * (1 + wanted.double().abs())).any()):
            first, by = name, most
    return Difference(largest, where, first, by)


def _exact(model: nn.Module) -> nn.Module:
    """A copy in float64 whose layers drop nothing: those that are there to, and those that do it on the side."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0  # a number of theirs, of no layer: of attention's weights, between an RNN's layers
    return model


def _first(task: Task, batches: int, seed: int) -> Task:
    """The first batches of an epoch, those that are like its first: sync has static shapes. None to evaluate on."""
    reseed(seed, "epoch", 0)
    pairs = (check_batch(pair, task.classes, number) for number, pair in enumerate(task.train, start=1))
    drawn = [(_all_wide(x), _wide(y)) for x, y in islice(pairs, batches)]
    alike = [batch for batch in drawn if _shapes(*batch) == _shapes(*drawn[0])]
    return replace(task, train=alike, validation=None, prompt=None)


def _all_wide(x: Given) -> Given:
    h, along = parted(x)
    return joined(_wide(h), None if along is None else _wide(along))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _shapes(x: Given, y: Tensor) -> list[torch.Size | None]:
    return [None if tensor is None else tensor.shape for tensor in (*parted(x), y)]


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


__all__ = ["Difference", "Prepared", "difference", "plain", "prepared", "read", "work"]
