"""What a stage saves and is made of again, by the whole model's names.

Stage ── state_of ──► StageState (checkpoint/) ── load_state ──► Stage
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.checkpoint import StageState
from dnipipe.errors import CheckpointError
from dnipipe.learner import Learner
from dnipipe.split import Plan
from dnipipe.stage import Stage
from dnipipe.unlocked import UnlockedStage


def state_of(stage: Stage, plan: Plan) -> StageState:
    """What the stage is right now. Raises NonFiniteLoss if its last loss was not finite and nobody had looked yet."""
    stage.rule.settle()
    while stage.behind:
        stage.catch_up()
    learner, named = stage.rule.learner, dict(stage.module.named_parameters())
    predictor, learned = stage.rule.shelf
    if learner is not None:
        predictor = dict(learner.predictor.state_dict())
        learned = checkpoint.optimizer_state(learner.adam, dict(learner.predictor.named_parameters()))
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
        counters={"batch": stage.last_batch, "updates": stage.updates, **(_trust_of(learner) if learner else {})},
        optimizer_name=type(stage.descent.optimizer).__name__,
        **guessing,
    )


def _trust_of(learner: Learner) -> dict[str, float]:
    """What a stage thinks of its predictor, so that one that was not trusted is not trusted again by a restart."""
    learner.trust.judge()
    seen = learner.trust.likeness
    if seen is None:
        return {}
    return {"likeness": seen, "length": learner.trust.length, "trusted": float(learner.trust.good)}


def load_state(stage: Stage, state: StageState) -> None:
    """Make the stage what was saved. A boundary that did not exist then keeps its fresh predictor.

    A rule without a predictor keeps the saved one on its shelf, so that a later rule goes on with it.
    """
    stage.module.load_state_dict(state.weights)
    learner, named = stage.rule.learner, dict(stage.module.named_parameters())
    _check_optimizer(state.optimizer_name, type(stage.descent.optimizer).__name__)
    checkpoint.load_optimizer_state(stage.descent.optimizer, named, state.optimizer)
    for name, gradient in state.gradients.items():
        named[name].grad = gradient.to(named[name].device, copy=True)
    if learner is None:
        stage.rule.shelf = state.predictor, state.predictor_optimizer
    elif state.predictor:
        what = f"predictor saved at {state.boundary}"
        _load_learned(learner.predictor, learner.adam, state.predictor, state.predictor_optimizer, what)
        if (seen := state.counters.get("likeness")) is not None:
            learner.trust.likeness, learner.trust.good = seen, bool(state.counters["trusted"])
            learner.trust.length = state.counters.get("length", 1.0)  # older checkpoints have none
    if isinstance(stage, UnlockedStage) and stage.inputs and state.inputs:
        weights = {name.partition(".")[2]: tensor for name, tensor in state.inputs.items()}
        moments = {name.partition(".")[2]: values for name, values in state.inputs_optimizer.items()}
        what = f"model of the input of {next(iter(state.inputs)).partition('.')[0]}"
        _load_learned(stage.inputs.net, stage.inputs.optimizer, weights, moments, what)


def _check_optimizer(saved: str, own: str) -> None:
    """Adam's moments are AdamW's; NAdam, or SGD, keeps others, and would miss them at the first step, or misread them.

    Raises CheckpointError.
    """
    if saved and saved.removesuffix("W") != own.removesuffix("W"):
        raise CheckpointError(
            f"the run was trained with {saved}, and {own} cannot go on with what that keeps of each weight: go on with "
            "the optimizer (optimizer.name) of the run's config.toml, or begin a new run"
        )


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


__all__ = ["boundary_of", "first_of", "load_state", "state_of"]
