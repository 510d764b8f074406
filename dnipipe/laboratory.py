"""All stages of a run in this process, taking turns: what `transport.kind = local` trains with.

The same stages, rules, predictors and worker loops as over a network, one thread a stage; only the transport differs
(transport/laboratory.py), and with it time: a hop takes exactly `transport.delay` batches, and a run repeats bitwise.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import torch

from dnipipe.agreement import agree, owned, settle
from dnipipe.building import Job
from dnipipe.data import Task
from dnipipe.errors import PeerError, RunError
from dnipipe.session import build, conclude, head_of, interruptible, worker_of
from dnipipe.transport.laboratory import Laboratory, LaboratoryTransport
from dnipipe.worker import Worker

END = 10.0  # seconds in which the others must have ended behind stage 0


def work(job: Job, resume: bool = False, name: str = "run") -> Path:
    """The whole run. Returns its folder, called `name` if the settings name none. Raises DnipipeError when it cannot go
    on."""
    settings, stages = job.config, job.config.pipeline.stages
    torch.manual_seed(settings.train.seed)
    model = job.model()
    tasks: list[Task] = []
    with ExitStack() as stack:
        agreed = agree(stack.enter_context(owned(job, resume, name)), model, tasks, resume)
        lab = Laboratory(stages, settings.transport.delay, timeout=settings.transport.timeout, threads=stages)
        built = [build(job, model, agreed, k) for k in range(stages)]
        if resume:
            settle(job, agreed)
        head = stack.enter_context(head_of(settings, tasks[0], agreed, built[0].metrics))
        workers = [
            stack.enter_context(worker_of(settings, agreed, stage, transport, None if stage.index else head))
            for stage, transport in zip(built, lab.transports, strict=True)
        ]
        _take_turns(workers, lab.transports)
    conclude(job, tasks[0], agreed, head)
    return Path(agreed.folder)


def _take_turns(workers: list[Worker], transports: list[LaboratoryTransport]) -> None:
    """Stage 0 in this thread, which signals come to, the others in threads of their own; raises what failed first."""
    errors: list[BaseException] = []
    others = [
        threading.Thread(target=_run, args=(worker, transport, errors), name=f"stage {worker.index}", daemon=True)
        for worker, transport in zip(workers[1:], transports[1:], strict=True)
    ]
    for thread in others:
        thread.start()
    with interruptible(workers[0]):
        _run(workers[0], transports[0], errors)
    for thread in others:
        thread.join(END)
    if errors:
        raise next((error for error in errors if not isinstance(error, PeerError)), errors[0])
    if late := [thread.name for thread in others if thread.is_alive()]:
        raise RunError(f"{', '.join(late)} did not end within {END:g} s of stage 0")


def _run(worker: Worker, transport: LaboratoryTransport, errors: list[BaseException]) -> None:
    try:
        transport.join()
        worker.run()
    except BaseException as error:
        errors.append(error)
    finally:
        transport.close()


__all__ = ["work"]
