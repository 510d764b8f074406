"""From a job to a stage: the plan that stage 0 makes of model and data, a stage of that plan, and what it saves.

Job ─► first_batch ─► plan_for ─► Plan ─► build_stage ─► Stage ─ state_of ─► StageState
                                                              ◄─ load_state ─
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe import checkpoint, gradient_rules, inputs, optim, predictors, split
from dnipipe.checkpoint import StageState
from dnipipe.config import Config
from dnipipe.data import Task, check_batch
from dnipipe.errors import CheckpointError, ConfigError, DataError, HandshakeError
from dnipipe.metrics import StageMetrics
from dnipipe.optim import Descent, OptimizerFactory
from dnipipe.predictors import Loss
from dnipipe.randomness import reseed
from dnipipe.sometimes import Sometimes
from dnipipe.split import Plan
from dnipipe.stage import Stage
from dnipipe.unlocked import UnlockedStage
from dnipipe.window import Window


@dataclass(frozen=True)
class Job:
    """What to train. Every process has one; functions, so that each builds only what it needs."""

    config: Config
    model: Callable[[], nn.Module]
    loss: Loss
    optimizer: OptimizerFactory
    task: Callable[[], Task]  # called by stage 0 only
    schedule: Callable[[int], float] | None = None  # None: as the configuration says
    script: bool = False  # a user's own (dnipipe.Run): weights are those of stage 0's model, not the seed's


# -- the plan ----------------------------------------------------------------------------------------------------


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
    by_time = settings.transport.kind != "local"  # a measured cut may differ from run to run
    made = split.plan(model, pipeline.stages, pipeline.boundaries, x, y, classes, str(device_of(settings)), by_time)
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


# -- a stage of it -----------------------------------------------------------------------------------------------


def build_stage(job: Job, model: nn.Module, plan: Plan, index: int, total: int, measured: StageMetrics) -> Stage:
    """Stage `index` of the plan, out of the whole model. Its predictor's initial weights depend on the seed alone."""
    settings, device, first_layer = job.config, device_of(job.config), plan.layers_of(index)[0]
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
    if settings.rule.p_update < 1:
        rule = Sometimes(rule, settings.rule.p_update, settings.train.seed, first_layer)
    kind = partial(UnlockedStage, inputs_of(settings, plan, index)) if settings.rule.forward_unlock else Stage
    return kind(
        index,
        plan.stages,
        module,
        rule,
        Descent(
            job.optimizer([p for p in module.parameters() if p.requires_grad]),
            job.schedule or optim.schedule(settings, total),
            settings.optimizer.clip,
            settings.rule.accumulate,
            settings.rule.reschedule,
        ),
        measured,
        loss=job.loss,
        seed=settings.train.seed,
        first_layer=first_layer,
        device=device,
    )


def inputs_of(settings: Config, plan: Plan, index: int) -> inputs.Inputs | None:
    """What guesses the stage's input; stage 0's needs no guess. Initial weights depend on seed and layer alone."""
    if index == 0:
        return None
    reseed(settings.train.seed, plan.layers_of(index)[0], "inputs")
    made = inputs.build(settings.predictor, plan.x, plan.x_dtype, plan.edge(index - 1))
    made.net.to(device_of(settings))
    return made


def check_model(model: nn.Module, plan: Plan, index: int) -> None:
    """Raises HandshakeError if the model built here is not the one that was planned."""
    names = tuple(name for name, _ in model.named_children())
    sizes = tuple(sum(p.numel() for p in layer.parameters()) for layer in model.children())
    for what, here, there in (("layers", names, plan.layers), ("parameters by layer", sizes, plan.parameters)):
        if here != there:
            raise HandshakeError(f"stage {index} built another model than stage 0: {what} {here} here, {there} there")


def window_of(settings: Config, plan: Plan, index: int) -> Window:
    """The setting; automatic: up to as many waiting batches as the memory limit holds, one if the rule waits."""
    if settings.rule.name == "wait" or (settings.pipeline.window == "auto" and index == plan.stages - 1):
        return Window(1)
    if settings.pipeline.window != "auto":
        return Window(settings.pipeline.window)
    if settings.transport.kind == "local":
        return Window(2 * settings.transport.delay + 2)  # what is under way and back, so that nothing holds stage 0 up
    elements = 1
    for size in plan.edge(index).h:
        elements *= size
    return Window(None, limit=min(256, settings.pipeline.memory * 2**20 // max(1, 3 * 4 * elements)))


# -- its state ---------------------------------------------------------------------------------------------------


def state_of(stage: Stage, plan: Plan) -> StageState:
    """What the stage is right now, by the whole model's names."""
    rule, named = stage.rule, dict(stage.module.named_parameters())
    predictor, learned = rule.shelf
    if rule.predictor is not None and rule.optimizer is not None:
        predictor = dict(rule.predictor.state_dict())
        learned = checkpoint.optimizer_state(rule.optimizer, dict(rule.predictor.named_parameters()))
    guessing: dict[str, dict[str, Any]] = {}
    if isinstance(stage, UnlockedStage) and stage.inputs:
        first, net = first_of(stage, plan), stage.inputs.net
        moments = checkpoint.optimizer_state(stage.inputs.optimizer, dict(net.named_parameters()))
        guessing["inputs"] = {f"{first}.{name}": tensor for name, tensor in net.state_dict().items()}
        guessing["inputs_optimizer"] = {f"{first}.{name}": values for name, values in moments.items()}
    return StageState(
        weights=dict(stage.module.state_dict()),
        optimizer=checkpoint.optimizer_state(stage.descent.optimizer, named),
        gradients={name: p.grad for name, p in named.items() if p.grad is not None},
        boundary=boundary_of(stage, plan),
        predictor=predictor,
        predictor_optimizer=learned,
        counters={"batch": stage.last_batch, "updates": stage.updates},
        **guessing,
    )


def load_state(stage: Stage, state: StageState) -> None:
    """Make the stage what was saved. A boundary that did not exist then keeps its fresh predictor.

    A rule without a predictor keeps the saved one on its shelf, so that a later rule goes on with it.
    """
    stage.module.load_state_dict(state.weights)
    rule, named = stage.rule, dict(stage.module.named_parameters())
    checkpoint.load_optimizer_state(stage.descent.optimizer, named, state.optimizer)
    for name, gradient in state.gradients.items():
        named[name].grad = gradient.to(named[name].device, copy=True)
    if rule.predictor is None or rule.optimizer is None:
        rule.shelf = state.predictor, state.predictor_optimizer
    elif state.predictor:
        what = f"predictor saved at {state.boundary}"
        _load_learned(rule.predictor, rule.optimizer, state.predictor, state.predictor_optimizer, what)
    if isinstance(stage, UnlockedStage) and stage.inputs and state.inputs:
        weights = {name.partition(".")[2]: tensor for name, tensor in state.inputs.items()}
        moments = {name.partition(".")[2]: values for name, values in state.inputs_optimizer.items()}
        what = f"model of the input of {next(iter(state.inputs)).partition('.')[0]}"
        _load_learned(stage.inputs.net, stage.inputs.optimizer, weights, moments, what)


def _load_learned(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    learned: dict[str, dict[str, Any]],
    what: str,
) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise CheckpointError(
            f"the {what} is of another kind than the settings say: go on with the [predictor] settings of the run's "
            "config.toml"
        ) from None
    checkpoint.load_optimizer_state(optimizer, dict(module.named_parameters()), learned)


def boundary_of(stage: Stage, plan: Plan) -> str:
    """What a predictor is known by: the stage's last layer. The last stage has none."""
    return "" if stage.last else plan.layers[plan.layers_of(stage.index)[-1]]


def first_of(stage: Stage, plan: Plan) -> str:
    """What the model of a stage's input is known by: the stage's first layer."""
    return plan.layers[plan.layers_of(stage.index)[0]]
