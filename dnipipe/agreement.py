"""What stage 0 decides for all, before any stage is built: the data, the cut, the folder, where the run begins.

settings ─► owned: a folder, locked ─► agree: data, measured layers, plan, checkpoint ─► Agreement ──► every stage
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch.nn as nn
from torch import Tensor

from dnipipe import checkpoint, config
from dnipipe.building import Job, first_batch, plan_for, total_batches
from dnipipe.config import shared_settings
from dnipipe.data import Task
from dnipipe.disk import disk
from dnipipe.errors import ConfigError, DataError
from dnipipe.folders import ELSEWHERE, INITIAL, alone, begun, check_unused, write_config
from dnipipe.split import Plan, places


@dataclass(frozen=True)
class Agreement:
    """What stage 0 decides for all."""

    run_id: str
    folder: str
    total: int  # the last batch id
    start: int  # the batch id of the checkpoint to continue from; 0: from the beginning
    settings: tuple[str, ...]
    plan: Plan

    def to_json(self) -> str:
        return json.dumps({**vars(self), "plan": self.plan.to_json()})

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        values = json.loads(text)
        plan, settings = Plan.from_json(values.pop("plan")), tuple(values.pop("settings"))
        return cls(plan=plan, settings=settings, **values)


@contextmanager
def owned(job: Job, resume: bool, name: str) -> Iterator[Job]:
    """The job, with the run's folder made, named in its settings, and this run's alone."""
    with begun(job.config.output, name, resume) as folder, alone(folder):
        yield replace(job, config=config.replace(job.config, output={"run": str(folder)}))


def agree(job: Job, model: nn.Module, tasks: list[Task], resume: bool) -> Agreement:
    """What stage 0 decides; its data, which only it has, goes into `tasks`. Writes what a new run begins with."""
    settings, task = job.config, job.task()
    folder = Path(settings.output.run)
    if not resume:
        check_unused(folder)
    found = checkpoint.newest(folder) if resume else None
    x, y = first_batch(task)
    plan = plan_for(_cut_as(found, job, model), model, x, y, task.classes)
    tasks.append(replace(task, classes=plan.classes))
    total, start = total_batches(settings, task), found.batch if found else 0
    if start > total or (start == total and _finished(folder, total)):
        raise ConfigError(
            f"the checkpoint in {folder} is at batch {start} and the run ends at {total}: "
            "raise train.batches or train.epochs to go on"
        )
    with disk(f"cannot make {folder / 'metrics'}", ELSEWHERE, start=True):
        (folder / "metrics").mkdir(parents=True, exist_ok=True)
    agreed = Agreement(secrets.token_hex(8), str(folder), total, start, shared_settings(settings), plan)
    if not resume:
        settle(job, agreed)
        if job.script:
            with disk(f"cannot write {folder / INITIAL}", ELSEWHERE, start=True):
                checkpoint.write_tensors(folder / INITIAL, _whole(model))
    return agreed


def _finished(folder: Path, batch: int) -> bool:
    """Whether the run in the folder came to its end at this batch: if it died in its last evaluation, that is left."""
    try:
        told = json.loads((folder / "summary.json").read_text())
        return told["finished"] is True and told["batch"] == batch
    except (OSError, ValueError, KeyError, TypeError):
        return False


def settle(job: Job, agreed: Agreement) -> None:
    """Write down what is trained, over what the start before has left. A resumed run is settled once every stage is
    built: if one refuses the settings, the folder stays as it was, and can be resumed as before."""
    folder = Path(agreed.folder)
    if job.config.output.trace:  # times of two starts do not make one timeline
        shutil.rmtree(folder / "trace", ignore_errors=True)
    if not job.script:
        write_config(folder, job.config)


def once_more(job: Job, resume: bool, earlier: str | None) -> tuple[Job, bool]:
    """Started again by torchrun, the run goes on in its own folder, whichever that was: (job, whether to resume it).

    From its newest complete checkpoint, or anew if it has none. earlier: what this run's earlier start agreed on; a
    folder that this run was refused, for it holds another, is no folder of its own.
    """
    if earlier is None:
        return job, resume
    folder = Path(Agreement.from_json(earlier).folder)
    job = replace(job, config=config.replace(job.config, output={"run": str(folder)}))
    return job, any(folder.glob("checkpoints/*/manifest.json"))


def _cut_as(found: checkpoint.Checkpoint | None, job: Job, model: nn.Module) -> Job:
    """Without boundaries a run goes on cut as it was, if in as many stages: its predictors stand where the cuts are.

    A balance measured anew, or for another rule, might cut elsewhere, and what they have learnt would be lost.
    """
    pipeline, names = job.config.pipeline, [name for name, _ in places(model)]
    if found is None or pipeline.boundaries or found.stages != pipeline.stages:
        return job
    lasts = [part.boundary for part in found.parts[:-1]]
    if not set(lasts) <= set(names):
        return job  # of another model, which is said when it is loaded
    cut = tuple(names.index(last) + 1 for last in lasts)
    return replace(job, config=config.replace(job.config, pipeline={"boundaries": cut}))


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def share_weights(model: nn.Module, folder: Path, rank: int) -> None:
    """A user's script builds the model in every process; the weights that count are those of stage 0."""
    path = folder / INITIAL
    if not path.exists():
        raise DataError(
            f"stage {rank} cannot see {path}, the initial weights: put output.dir on a folder all machines share"
        )
    model.load_state_dict(safetensors.torch.load_file(path))


__all__ = ["Agreement", "agree", "once_more", "owned", "settle", "share_weights"]
