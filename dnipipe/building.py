"""From a job to a stage: the plan that stage 0 makes of model and data, and a stage of that plan.

Job ─► first_batch ─► plan_for ─► Plan ─► build_stage ─► Stage
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe import inputs, kinds, optim, split
from dnipipe.beside import Beside, beside
from dnipipe.config import Config, phases
from dnipipe.costs import work_of
from dnipipe.data import Task, check_batch, length_of
from dnipipe.errors import ConfigError, DataError, HandshakeError
from dnipipe.execution import compile_forward, round_off, rounded
from dnipipe.gradient_rules import RULES, GradientRule
from dnipipe.last_stage import LossGradient
from dnipipe.learner import Learner
from dnipipe.lessons import Replay
from dnipipe.measuring import Work
from dnipipe.metrics import StageMetrics
from dnipipe.optim import Descent, OptimizerFactory
from dnipipe.pairs import Given, joined
from dnipipe.phases import Phases
from dnipipe.predictors import Edge, Loss
from dnipipe.randomness import reseed
from dnipipe.sometimes import Sometimes
from dnipipe.split import Like, Plan
from dnipipe.stage import Stage
from dnipipe.staging import StagedTransport
from dnipipe.started import unheard
from dnipipe.stash import Graphs
from dnipipe.sync import SyncStage
from dnipipe.transport import Side, Transport
from dnipipe.transport.nccl import NcclTransport
from dnipipe.trust import Trust
from dnipipe.turns import Turns, Unanswered
from dnipipe.unlocked import UnlockedStage
from dnipipe.window import Window
from dnipipe.wire import Wire


@dataclass(frozen=True)
class Job:
    """What to train. Every process has one; functions, so that each builds only what it needs."""

    config: Config
    model: Callable[[], nn.Module]
    loss: Loss
    optimizer: OptimizerFactory
    task: Callable[[], Task]  # called by stage 0, and by who draws batches itself (service/drawing.py)
    schedule: Callable[[int], float] | None = None  # None: as the configuration says
    script: bool = False  # a user's own (dnipipe.Run): weights are those of stage 0's model, not the seed's


# -- the plan ----------------------------------------------------------------------------------------------------


def first_batch(task: Task) -> tuple[Given, Tensor]:
    """The batch that is measured; drawing it leaves torch's random state as it was.

    Raises DataError if there is none, to train on or to evaluate on.
    """
    if length_of(task.validation) == 0:
        raise DataError("the validation data has no batch: give it some, or leave it out")
    with torch.random.fork_rng():
        with unheard():
            drawn = iter(task.train)
        pair = next(drawn, None)
    if pair is None:
        raise DataError("the training data has no batch: it is empty")
    return check_batch(pair, task.classes, 1)


def plan_for(job: Job, model: nn.Module, x: Given, y: Tensor, classes: int | None) -> Plan:
    """The plan, with the number of classes taken from the model's output where the data does not say it."""
    settings, pipeline, device = job.config, job.config.pipeline, device_of(job.config)
    made = split.plan(
        model,
        pipeline.stages,
        pipeline.boundaries,
        x,
        y,
        classes,
        str(device),
        by_time=settings.transport.kind != "local",  # a measured cut may differ from run to run
        prepare=partial(round_off, settings=pipeline, device=device),
        work=partial(_work, replace(job, loss=rounded(job.loss, pipeline, device)), y.to(device)),
    )
    if classes is None and made.classes is not None:
        check_batch((x, y), made.classes, 1)
    return made


def _work(job: Job, y: Tensor, edge: Edge) -> Work:
    """What a batch is to a stage that ends at this edge, measured; of the last rule, if there are several."""
    settings, device = job.config, device_of(job.config)
    name = phases(settings.rule)[-1][1]
    if name == "sync":
        return Work()  # along torch's schedule, which keeps the graph
    with torch.random.fork_rng():
        try:
            rule = RULES[name].build(settings, lambda: _learner(job, edge, 0))
            h, first = torch.randn(edge.h, device=device), settings.rule.warmup + 1
            every = mended_every(settings, name)
            return work_of(rule, h, y, first, graphs=not settings.pipeline.compile, every=every)
        except Exception:  # no such predictor can stand here: whoever cuts here is told so, others need not be
            return Work()


def total_batches(settings: Config, task: Task) -> int:
    an_epoch = length_of(task.train)
    if an_epoch is None and not settings.train.batches:
        raise DataError(
            "the training data has no length (len() fails), so an epoch has no end that is known: set train.batches "
            "(in a script train={'batches': N}), or pass a DataLoader over a map-style Dataset, or a list of batches"
        )
    return settings.train.batches or settings.train.epochs * (an_epoch or 0)


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


def beside_of(settings: Config) -> Beside:
    """This process's. Stages that share it are on one line: what one of them makes, the next one finds made."""
    return beside(device_of(settings), lines=settings.transport.kind != "local")


# -- a stage of it -----------------------------------------------------------------------------------------------


def build_stage(job: Job, model: nn.Module, plan: Plan, index: int, total: int, measured: StageMetrics) -> Stage:
    """Stage `index` of the plan, out of the whole model. Its predictor's initial weights depend on the seed alone."""
    settings, device = job.config, device_of(job.config)
    # whatever the user, or an evaluation of a run before this one, left its layers in
    module = round_off(split.part(model, plan, index).to(device).train(), settings.pipeline, device)
    if compiled := settings.pipeline.compile:
        x, along = plan.input(index)
        compile_forward(module, joined(_zeros(x, device), along and _zeros(along, device)))
    job = replace(job, loss=rounded(job.loss, settings.pipeline, device))
    return kind_of(settings, plan, index)(
        index,
        plan.stages,
        module,
        rule_of(job, plan, index, measured),
        Descent(
            optim.made_by(job.optimizer, [p for p in module.parameters() if p.requires_grad]),
            job.schedule or optim.schedule(settings, total),
            settings.optimizer.clip,
            settings.rule.accumulate,
            settings.rule.reschedule,
            0 if index == plan.stages - 1 else settings.rule.lookahead,  # nothing is late in the last
        ),
        measured,
        loss=job.loss,
        skips_nan=settings.train.on_nan == "skip",
        seed=settings.train.seed,
        first_layer=plan.layers_of(index)[0],
        beside=beside_of(settings),
        # a compiled graph may reuse what it has saved, and is gone after one backward
        graphs=Graphs(0 if compiled else settings.pipeline.memory * 2**20 // 2),
        copies=plan.copies(index),
    )


def _zeros(like: Like, device: torch.device) -> Tensor:
    return torch.zeros(like[1], dtype=getattr(torch, like[0]), device=device)


def kind_of(settings: Config, plan: Plan, index: int) -> Callable[..., Stage]:
    """What makes the stage, called as Stage is: how batches come to it."""
    if settings.rule.name == "sync":
        return partial(SyncStage, settings.sync, plan)
    if settings.rule.forward_unlock and (plan.x_along or any(plan.alongs)):
        raise ConfigError(
            "rule.forward_unlock = true: a guess is of one tensor, and the data, or a layer, gives pairs: leave it at "
            "false"
        )
    return partial(UnlockedStage, inputs_of(settings, plan, index)) if settings.rule.forward_unlock else Stage


def rule_of(job: Job, plan: Plan, index: int, measured: StageMetrics) -> GradientRule:
    """Where the stage's gradients come from; the last stage's from the loss. One predictor serves all its rules."""
    settings = job.config

    @functools.cache
    def learner() -> Learner:
        return _learner(job, plan.edge(index), settings.train.seed + plan.layers_of(index)[-1] + 1)

    def rule(start: int, name: str) -> GradientRule:
        one: GradientRule
        others: GradientRule
        if index == plan.stages - 1:
            one, others = loss_gradient(RULES[name].teaches), loss_gradient(False)
        else:
            one = RULES[name].build(_from(settings, start), learner)
            others = Unanswered(one)
        every = mended_every(settings, name)
        return drawn(one) if every == 1 else Turns(drawn(one), drawn(others), every)

    def loss_gradient(teaches: bool) -> GradientRule:
        stops = settings.train.on_nan == "stop"
        return LossGradient(job.loss, teaches, measured.loss, stops, beside_of(settings))

    def drawn(rule: GradientRule) -> GradientRule:
        p, first_layer = settings.rule.p_update, plan.layers_of(index)[0]
        return rule if p == 1 else Sometimes(rule, p, settings.train.seed, first_layer)

    rules = [(start, rule(start, name)) for start, name in phases(settings.rule)]
    return rules[0][1] if len(rules) == 1 else Phases(rules)


def mended_every(settings: Config, name: str) -> int:
    """n: of how many batches this rule mends one, for only that one's gradient is carried."""
    return settings.wire.gradient_every if RULES[name].again else 1


def _from(settings: Config, start: int) -> Config:
    """As a rule that begins at batch `start` has them: what warms up does so from there on."""
    warmup = settings.rule.warmup
    return replace(settings, rule=replace(settings.rule, warmup=start - 1 + warmup if warmup else 0))


def _learner(job: Job, edge: Edge, seed: int) -> Learner:
    """A new predictor for this edge, on the device, with what teaches it."""
    settings, device = job.config, device_of(job.config)
    torch.manual_seed(seed)
    predictor = kinds.build(settings.predictor, edge, job.loss)
    for part in predictor.children():
        round_off(part, settings.pipeline, device, guesses=True)
    lessons = Replay(settings.predictor.replay, settings.predictor.steps)
    return Learner(
        predictor.to(device),
        settings.predictor.lr,
        lessons,
        settings.predictor.rows,
        careful=settings.train.on_nan == "skip",
        trust=Trust(settings.rule.trust, settings.rule.trust_length),
        lazily=settings.predictor.lazily,
    )


def inputs_of(settings: Config, plan: Plan, index: int) -> inputs.Inputs | None:
    """What guesses the stage's input; stage 0's needs no guess. Initial weights depend on seed and layer alone."""
    if index == 0:
        return None
    reseed(settings.train.seed, plan.layers_of(index)[0], "inputs")
    made = inputs.build(settings.predictor, plan.x, plan.x_dtype, plan.edge(index - 1))
    device = device_of(settings)
    round_off(made.net.to(device), settings.pipeline, device)
    return made


def check_model(model: nn.Module, plan: Plan, index: int) -> None:
    """Raises HandshakeError if the model built here is not the one that was planned."""
    layers = split.places(model)
    names = tuple(name for name, _ in layers)
    sizes = tuple(sum(p.numel() for p in layer.parameters()) for _, layer in layers)
    for what, here, there in (("layers", names, plan.layers), ("parameters by layer", sizes, plan.parameters)):
        if here != there:
            raise HandshakeError(f"stage {index} built another model than stage 0: {what} {here} here, {there} there")


def window_of(settings: Config, plan: Plan, index: int) -> Window:
    """The setting; automatic: up to as many waiting batches as the memory limit holds, of the first one's shape."""
    if settings.pipeline.window == "auto" and index == plan.stages - 1:
        return Window(1)
    if settings.pipeline.window != "auto":
        return Window(settings.pipeline.window)
    if settings.transport.kind == "local":
        hops = 2 * (plan.stages - 1 - index)  # to the loss and back, so that nothing holds stage 0 up
        return Window(hops * settings.transport.delay + 2)
    budget = settings.pipeline.memory * 2**20
    kept = 4 * torch.Size(plan.edge(index).h).numel()  # x, h, ĝ and J^T ĝ, about
    if settings.rule.stash:
        budget //= 2  # the other half is for graphs
        kept += sum(plan.parameters[layer] for layer in plan.layers_of(index))
    return Window(None, limit=min(256, budget // max(1, 4 * kept)), memory=budget)


def wired(settings: Config, plan: Plan, measured: StageMetrics, transport: Transport) -> Transport:
    """The stage's transport; around it, on a GPU, what takes its tensors from there; and around that what makes them
    smaller on the way, if the settings ask for any."""
    index, lines = measured.stage, beside_of(settings)
    if lines.are_there:
        direct = isinstance(transport, NcclTransport)
        transport = StagedTransport(transport, lines, direct, busy=measured.clock.span("device"))
    if not settings.wire.changes:
        return transport
    edges = {Side.PREVIOUS: index - 1, Side.NEXT: index}
    dtypes = {side: getattr(torch, plan.h(k)[0]) for side, k in edges.items() if 0 <= k < plan.stages - 1}
    return Wire(transport, settings.wire, dtypes, settings.train.seed, lines)
