"""One process's part in a run, from the environment that torchrun gives it to its last word.

work(job):  rendezvous ─► agree (stage 0 loads the data, measures, cuts) ─► build the stage ─► (resume)
            ─► listen, connect, Hello ─► Worker.run ─► stage 0 writes the summary and says how it went
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from dnipipe import checkpoint, gloo, metrics, result
from dnipipe.agreement import Agreement, agree, once_more, owned, settle, share_weights
from dnipipe.building import Job, build_stage, check_model, window_of, wired
from dnipipe.config import Config, shared_settings
from dnipipe.data import Task
from dnipipe.display import Display
from dnipipe.errors import ConfigError
from dnipipe.greeting import check_settings
from dnipipe.head import Head
from dnipipe.messages import Hello
from dnipipe.metrics import JsonLines, StageMetrics
from dnipipe.opening import edges, opened
from dnipipe.rendezvous import Rendezvous, socket_folder
from dnipipe.stage import Stage
from dnipipe.state import boundary_of, first_of, load_state, state_of
from dnipipe.sync import SyncStage
from dnipipe.tracing.writer import Trace
from dnipipe.transport import Side, Transport
from dnipipe.transport.apart import ApartTransport
from dnipipe.worker import Worker


def work(job: Job, resume: bool = False, name: str = "run") -> Path:
    """This process's part in the run: one stage, from start to end. Returns the run's folder, which stage 0 chose.

    name: of a run whose folder the settings do not name. Raises DnipipeError when the run cannot go on.
    """
    settings = job.config
    meeting = _met(settings.transport.timeout)
    if meeting.world != settings.pipeline.stages:
        raise ConfigError(
            f"{meeting.world} processes were started, but pipeline.stages = {settings.pipeline.stages}: "
            f"start {settings.pipeline.stages}, or set --pipeline.stages {meeting.world}"
        )
    job, resume = once_more(job, resume, meeting.earlier("agreement"))
    if meeting.earlier("finished/0") is not None:  # the run is over: what died went on behind it
        return Path(job.config.output.run)
    torch.manual_seed(settings.train.seed)
    model = job.model()
    tasks: list[Task] = []  # stage 0 keeps its own
    with ExitStack() as stack:

        def decide() -> str:
            return agree(stack.enter_context(owned(job, resume, name)), model, tasks, resume).to_json()

        agreed = Agreement.from_json(meeting.agree(decide))
        sockets = socket_folder()
        stack.callback(sockets.cleanup)
        with meeting.together("built", f"endpoint/{meeting.rank}"):
            stage = build(job, model, agreed, meeting.rank)
            transport = stack.enter_context(
                opened(meeting, settings, agreed.run_id, agreed.plan, Path(sockets.name), stage.metrics)
            )
        if agreed.start:
            with meeting.together("settled"):  # before any stage writes into the folder
                if tasks:
                    settle(job, agreed)
        if isinstance(transport, ApartTransport):
            for side, lower in edges(meeting).items():
                transport.join(side, meeting.part(f"{transport.way}/{lower}"))
        if isinstance(stage, SyncStage):
            with meeting.together("joined"):
                address, private = settings.transport.address, settings.security.private_network
                stack.enter_context(gloo.joined(meeting, agreed.run_id, address, private))
                stage.join(settings.transport.timeout)
        with ExitStack() as writers:
            head = writers.enter_context(head_of(settings, tasks[0], agreed, stage.metrics)) if tasks else None
            worker = writers.enter_context(worker_of(settings, agreed, stage, transport, head))
            with interruptible(worker):
                worker.greet(_hellos(meeting, settings, agreed))
                sockets.cleanup()  # the neighbours are connected: nobody else can be; a killed process leaves no file
                worker.run()
        with meeting.together("finished"):  # whoever goes on behind this finds the summary
            if head:
                conclude(job, tasks[0], agreed, head)
        # only now does an edge close: stage 0 has the last reports, so nothing that was sent is still under way
    meeting.leave()
    return Path(agreed.folder)


def build(job: Job, model: nn.Module, agreed: Agreement, rank: int) -> Stage:
    """This process's stage, as it is at the beginning or in the checkpoint."""
    check_settings(shared_settings(job.config), agreed.settings, f"stage {rank}", "stage 0")
    check_model(model, agreed.plan, rank)
    if job.script and not agreed.start:
        share_weights(model, Path(agreed.folder), rank)
    stage = build_stage(job, model, agreed.plan, rank, agreed.total, StageMetrics(rank, agreed.plan.stages))
    if agreed.start:
        saved = checkpoint.at(Path(agreed.folder), agreed.start)
        saved.check_model(model.state_dict())
        ends = boundary_of(stage, agreed.plan), first_of(stage, agreed.plan)
        load_state(stage, saved.state_for(stage.module.state_dict(), *ends))
        stage.last_batch = agreed.start
    return stage


@contextmanager
def worker_of(
    settings: Config,
    agreed: Agreement,
    stage: Stage,
    transport: Transport,
    head: Head | None,
    kind: Callable[..., Worker] = Worker,
) -> Iterator[Worker]:
    """The loop of one stage, with what it writes."""
    folder, plan = Path(agreed.folder), agreed.plan
    log = JsonLines(folder / "metrics" / f"stage-{stage.index}.jsonl")
    path = folder / "trace" / f"stage-{stage.index}.jsonl"
    trace = Trace(path, stage.index, stage.stages) if settings.output.trace else None
    try:
        yield kind(
            stage,
            wired(settings, plan, stage.metrics, transport),
            window_of(settings, plan, stage.index),
            stage.metrics,
            log,
            lambda batch: checkpoint.save_part(folder, batch, stage.index, state_of(stage, plan)),
            timeout=settings.transport.timeout,
            report_every=settings.output.every,
            head=head,
            trace=trace,
        )
    finally:
        log.close()
        if trace:
            trace.close()


@contextmanager
def head_of(
    settings: Config, task: Task, agreed: Agreement, measured: StageMetrics, kind: Callable[..., Head] = Head
) -> Iterator[Head]:
    """Stage 0's script and display, which begins with what will be trained."""
    display = Display(agreed.plan.stages, agreed.total, agreed.start, quiet=settings.output.quiet)
    head = kind(settings, task, Path(agreed.folder), measured, display, agreed.start, agreed.total)
    for line in result.opening(settings, task, agreed.plan, agreed.folder, agreed.start):
        display.note(line)
    try:
        yield head
    finally:
        head.close()


def conclude(job: Job, task: Task, agreed: Agreement, head: Head) -> None:
    """The summary, on disk and for a person."""
    settings, folder = job.config, Path(agreed.folder)
    totals = [head.finals[k] for k in range(settings.pipeline.stages)]
    summary = metrics.summary(settings.rule.name, head.evaluation, totals, head.batch, not head.interrupted)
    metrics.write_json(folder / "summary.json", summary)
    result.closing(job, task, folder, head, summary)


# -- connecting --------------------------------------------------------------------------------------------------


_meetings: list[Rendezvous] = []  # the last of this process: under torchrun a script may fit more than once


def _met(timeout: float) -> Rendezvous:
    _meetings[:] = [_meetings[-1].another(timeout) if _meetings else Rendezvous(timeout)]
    return _meetings[-1]


def _hellos(meeting: Rendezvous, settings: Config, agreed: Agreement) -> dict[Side, Hello]:
    """What this stage says first on each of its edges."""
    k, plan = meeting.rank, agreed.plan
    hellos = {}
    for side, lower in edges(meeting).items():
        dtype, shape = plan.h(lower)
        hellos[side] = Hello(agreed.run_id, k, plan.stages, meeting.incarnation, agreed.settings, shape, dtype)
    return hellos


@contextmanager
def interruptible(worker: Worker) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the run to end in order; the handlers before come back afterwards."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: worker.interrupt()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
