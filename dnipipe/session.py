"""One process's part in a run, from the environment that torchrun gives it to its last word.

work(job):  rendezvous ─► agree (stage 0 loads the data, measures, cuts) ─► build the stage ─► (resume)
            ─► listen, connect, Hello ─► Worker.run ─► stage 0 writes the summary and says how it went
"""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from dnipipe import checkpoint, gradient_rules, metrics, optim, predictors, result, split
from dnipipe.checkpoint import StageState
from dnipipe.config import Config, shared_settings
from dnipipe.data import Task, check_batch
from dnipipe.display import Display
from dnipipe.errors import ConfigError, DataError, HandshakeError
from dnipipe.folders import check_unused, write_config
from dnipipe.head import Head
from dnipipe.messages import Hello
from dnipipe.metrics import JsonLines, StageMetrics
from dnipipe.optim import OptimizerFactory
from dnipipe.predictors import Loss
from dnipipe.rendezvous import Rendezvous, socket_folder
from dnipipe.split import Plan
from dnipipe.stage import Stage
from dnipipe.transport import Side, Transport
from dnipipe.transport.local import pipeline
from dnipipe.transport.zmq import ZmqTransport
from dnipipe.window import Window
from dnipipe.worker import Worker, check_settings


@dataclass(frozen=True)
class Job:
    """What to train. Every process has one; functions, so that each builds only what it needs."""

    config: Config
    model: Callable[[], nn.Module]
    loss: Loss
    optimizer: OptimizerFactory
    task: Callable[[], Task]  # called by stage 0 only
    schedule: Callable[[int], float] | None = None  # None: as the configuration says
    own_weights: bool = False  # the model's weights are stage 0's, not drawn from train.seed


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


def work(job: Job, resume: bool = False) -> None:
    """This process's part in the run: one stage, from start to end. Raises DnipipeError when the run cannot go on."""
    settings = job.config
    meeting = Rendezvous(settings.transport.timeout)
    if meeting.world != settings.pipeline.stages:
        raise ConfigError(
            f"{meeting.world} processes were started, but pipeline.stages = {settings.pipeline.stages}: "
            f"start {settings.pipeline.stages}, or set --pipeline.stages {meeting.world}"
        )
    torch.manual_seed(settings.train.seed)
    model = job.model()
    tasks: list[Task] = []  # stage 0 keeps its own
    agreed = Agreement.from_json(meeting.agree(lambda: _agree(job, model, tasks, resume).to_json()))
    with ExitStack() as stack:
        sockets = socket_folder()
        stack.callback(sockets.cleanup)
        with meeting.together("built"):
            stage = _build(job, model, agreed, meeting.rank)
            transport = stack.enter_context(_opened(meeting, settings, agreed, Path(sockets.name)))
        folder = Path(agreed.folder)
        log = JsonLines(folder / "metrics" / f"stage-{meeting.rank}.jsonl")
        stack.callback(log.close)
        head = stack.enter_context(_head(settings, tasks[0], agreed, stage.metrics)) if tasks else None
        worker = Worker(
            stage,
            transport,
            window_of(settings, agreed.plan, meeting.rank),
            stage.metrics,
            log,
            lambda batch: checkpoint.save_part(folder, batch, meeting.rank, state_of(stage, agreed.plan)),
            timeout=settings.transport.timeout,
            report_every=settings.output.every,
            head=head,
        )
        with _interruptible(worker):
            worker.greet(_hellos(meeting, settings, agreed))
            sockets.cleanup()  # the neighbours are connected: nobody else can be, and a killed process leaves no file
            worker.run()
    with meeting.together("finished"):  # whoever goes on behind this finds the summary
        if head:
            _conclude(settings, tasks[0], folder, head)


def _build(job: Job, model: nn.Module, agreed: Agreement, rank: int) -> Stage:
    """This process's stage, as it is at the beginning or in the checkpoint."""
    check_settings(shared_settings(job.config), agreed.settings, f"stage {rank}", "stage 0")
    check_model(model, agreed.plan, rank)
    if job.own_weights and not agreed.start:
        _share_weights(model, Path(agreed.folder), rank)
    stage = build_stage(job, model, agreed.plan, rank, agreed.total, StageMetrics(rank, agreed.plan.stages))
    if agreed.start:
        saved = checkpoint.at(Path(agreed.folder), agreed.start)
        saved.check_model(model.state_dict())
        load_state(stage, saved.state_for(stage.module.state_dict(), _boundary(stage, agreed.plan)))
        stage.last_batch = agreed.start
    return stage


@contextmanager
def _head(settings: Config, task: Task, agreed: Agreement, measured: StageMetrics) -> Iterator[Head]:
    """Stage 0's script and display, which begins with what will be trained."""
    display = Display(agreed.plan.stages, agreed.total, agreed.start, quiet=settings.output.quiet)
    head = Head(settings, task, Path(agreed.folder), measured, display, agreed.start, agreed.total)
    for line in result.opening(task, agreed.plan, agreed.folder, agreed.start):
        display.note(line)
    try:
        yield head
    finally:
        head.close()


def _conclude(settings: Config, task: Task, folder: Path, head: Head) -> None:
    totals = [head.finals[k] for k in range(settings.pipeline.stages)]
    summary = metrics.summary(settings.rule.name, head.seconds, head.evaluation, totals)
    metrics.write_json(folder / "summary.json", summary)
    result.closing(settings, task, folder, head, summary)


# -- what stage 0 decides ----------------------------------------------------------------------------------------


def _agree(job: Job, model: nn.Module, tasks: list[Task], resume: bool) -> Agreement:
    settings, task = job.config, job.task()
    x, y = first_batch(task)
    plan = plan_for(settings, model, x, y, task.classes)
    tasks.append(replace(task, classes=plan.classes))
    total = total_batches(settings, task)
    folder = Path(settings.output.run)
    if not resume:
        check_unused(folder)
    start = checkpoint.newest(folder).batch if resume else 0
    if start >= total:
        raise ConfigError(
            f"the checkpoint in {folder} is at batch {start} and the run ends at {total}: "
            "raise train.batches or train.epochs to go on"
        )
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    write_config(folder, settings)
    if job.own_weights and not resume:
        safetensors.torch.save_file(_whole(model), folder / "initial.safetensors")
    return Agreement(secrets.token_hex(8), str(folder), total, start, shared_settings(settings), plan)


def first_batch(task: Task) -> tuple[Tensor, Tensor]:
    """The batch that is measured; drawing it leaves torch's random state as it was."""
    with torch.random.fork_rng():
        pair = next(iter(task.train), None)
    if pair is None:
        raise DataError("the training data has no batch: it is empty")
    return check_batch(pair, task.classes, 1)


def plan_for(settings: Config, model: nn.Module, x: Tensor, y: Tensor, classes: int | None) -> Plan:
    """The plan, with the number of classes taken from the model's output where the data does not say it."""
    pipeline = settings.pipeline
    made = split.plan(model, pipeline.stages, pipeline.boundaries, x, y, classes, str(device_of(settings)))
    if classes is None and not y.is_floating_point() and len(made.shapes[-1]) == y.dim() + 1:
        made = replace(made, classes=made.shapes[-1][-1 if made.shapes[-1][:-1] == y.shape else 1])
        check_batch((x, y), made.classes, 1)
    return made


def total_batches(settings: Config, task: Task) -> int:
    try:
        an_epoch = len(task.train)
    except TypeError:
        raise DataError(
            "the training data has no length (len() fails): pass a DataLoader over a map-style Dataset, or a sequence "
            "of batches"
        ) from None
    return settings.train.batches or settings.train.epochs * an_epoch


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def _share_weights(model: nn.Module, folder: Path, rank: int) -> None:
    """A user's script builds the model in every process; the weights that count are those of stage 0."""
    path = folder / "initial.safetensors"
    if not path.exists():
        raise DataError(
            f"stage {rank} cannot see {path}, the initial weights: put output.dir on a folder all machines share"
        )
    model.load_state_dict(safetensors.torch.load_file(path))


# -- building ----------------------------------------------------------------------------------------------------


def build_stage(job: Job, model: nn.Module, plan: Plan, index: int, total: int, measured: StageMetrics) -> Stage:
    """Stage `index` of the plan, out of the whole model. Its predictor's initial weights depend on the seed alone."""
    settings, device = job.config, device_of(job.config)
    module = split.part(model, plan, index).to(device)
    rule_class = gradient_rules.RULES[settings.rule.name]
    rule: gradient_rules.GradientRule
    if index == plan.stages - 1:
        stop = settings.train.on_nan == "stop"
        rule = gradient_rules.LossGradient(job.loss, rule_class.teaches, measured.loss, stop)
    else:
        torch.manual_seed(settings.train.seed + plan.layers_of(index)[-1] + 1)
        rule = rule_class.build(
            settings, lambda: predictors.build(settings.predictor, plan.edge(index), job.loss).to(device)
        )
    return Stage(
        index,
        plan.stages,
        module,
        rule,
        job.optimizer([p for p in module.parameters() if p.requires_grad]),
        measured,
        loss=job.loss,
        schedule=job.schedule or optim.schedule(settings, total),
        clip=settings.optimizer.clip,
        seed=settings.train.seed,
        first_layer=plan.layers_of(index)[0],
        device=device,
    )


def check_model(model: nn.Module, plan: Plan, index: int) -> None:
    """Raises HandshakeError if the model built here is not the one that was planned."""
    names = tuple(name for name, _ in model.named_children())
    sizes = tuple(sum(p.numel() for p in layer.parameters()) for layer in model.children())
    for what, here, there in (("layers", names, plan.layers), ("parameters by layer", sizes, plan.parameters)):
        if here != there:
            raise HandshakeError(f"stage {index} built another model than stage 0: {what} {here} here, {there} there")


def device_of(settings: Config) -> torch.device:
    """The setting, or the GPU that the launcher's LOCAL_RANK names, or the CPU."""
    name = settings.pipeline.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("pipeline.device = cuda, but torch sees no GPU here: use cpu or auto")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"pipeline.device = {name}: expected auto, cpu or cuda") from None


def window_of(settings: Config, plan: Plan, index: int) -> Window:
    """The setting; automatic: up to as many waiting batches as the memory limit holds, one if the rule waits."""
    if settings.rule.name == "wait" or (settings.pipeline.window == "auto" and index == plan.stages - 1):
        return Window(1)
    if settings.pipeline.window != "auto":
        return Window(settings.pipeline.window)
    elements = 1
    for size in plan.edge(index).h:
        elements *= size
    return Window(None, limit=min(256, settings.pipeline.memory * 2**20 // max(1, 3 * 4 * elements)))


# -- connecting --------------------------------------------------------------------------------------------------


@contextmanager
def _opened(meeting: Rendezvous, settings: Config, agreed: Agreement, sockets: Path) -> Iterator[Transport]:
    """This stage's two edges: it binds the one to the next stage, and connects to the one before."""
    if meeting.world == 1:
        yield pipeline(1, capacity=1, timeout=settings.transport.timeout)[0]
        return
    names = {Side.PREVIOUS: f"stage {meeting.rank - 1}", Side.NEXT: f"stage {meeting.rank + 1}"}
    transport = ZmqTransport(
        agreed.run_id,
        queue=512,
        timeout=settings.transport.timeout,
        max_message=settings.transport.max_message * 2**20,
        names=names,
    )
    try:
        if meeting.rank < meeting.world - 1:
            address = meeting.address(settings.transport.scheme, settings.transport.address, sockets)
            meeting.publish(f"endpoint/{meeting.rank}", transport.listen(address))
        if meeting.rank > 0:
            transport.connect(meeting.get(f"endpoint/{meeting.rank - 1}", names[Side.PREVIOUS]))
        yield transport
    finally:
        transport.close()


def _hellos(meeting: Rendezvous, settings: Config, agreed: Agreement) -> dict[Side, Hello]:
    """What this stage says first on each of its edges."""
    k, plan = meeting.rank, agreed.plan
    hellos = {}
    for side, lower in ((Side.PREVIOUS, k - 1), (Side.NEXT, k)):
        if 0 <= lower < plan.stages - 1:
            layer = plan.layers_of(lower)[-1]
            hellos[side] = Hello(
                agreed.run_id,
                k,
                plan.stages,
                meeting.incarnation,
                agreed.settings,
                plan.shapes[layer],
                plan.dtypes[layer],
            )
    return hellos


@contextmanager
def _interruptible(worker: Worker) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the run to end in order; the handlers before come back afterwards."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: worker.interrupt()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- state -------------------------------------------------------------------------------------------------------


def state_of(stage: Stage, plan: Plan) -> StageState:
    """What the stage is right now, by the whole model's names."""
    rule = stage.rule
    predictor: dict[str, Any] = {}
    learned: dict[str, dict[str, Any]] = {}
    if rule.predictor is not None and rule.optimizer is not None:
        predictor = dict(rule.predictor.state_dict())
        learned = checkpoint.optimizer_state(rule.optimizer, dict(rule.predictor.named_parameters()))
    return StageState(
        weights=dict(stage.module.state_dict()),
        optimizer=checkpoint.optimizer_state(stage.optimizer, dict(stage.module.named_parameters())),
        boundary=_boundary(stage, plan),
        predictor=predictor,
        predictor_optimizer=learned,
        counters={"batch": stage.last_batch, "updates": stage.updates},
    )


def _boundary(stage: Stage, plan: Plan) -> str:
    """What a predictor is known by: the stage's last layer. The last stage has none."""
    return "" if stage.last else plan.layers[plan.layers_of(stage.index)[-1]]


def load_state(stage: Stage, state: StageState) -> None:
    """Make the stage what was saved. A boundary that did not exist then keeps its fresh predictor."""
    stage.module.load_state_dict(state.weights)
    checkpoint.load_optimizer_state(stage.optimizer, dict(stage.module.named_parameters()), state.optimizer)
    rule = stage.rule
    if state.predictor and rule.predictor is not None and rule.optimizer is not None:
        rule.predictor.load_state_dict(state.predictor)
        checkpoint.load_optimizer_state(
            rule.optimizer, dict(rule.predictor.named_parameters()), state.predictor_optimizer
        )
