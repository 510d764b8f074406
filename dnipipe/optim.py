"""Optimizers by name; schedules by batch id, alike on every stage, whenever it gets there; and when a stage steps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from dnipipe.config import Config
from dnipipe.errors import ConfigError

OptimizerFactory = Callable[[Iterable[Parameter]], torch.optim.Optimizer]
Schedule = Callable[[int], float]  # batch id, from 1 -> factor on the learning rate
Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def factory(config: Config) -> OptimizerFactory:
    """What makes a stage's optimizer out of its parameters."""
    settings = config.optimizer
    if settings.name == "sgd":
        return lambda parameters: untraced(torch.optim.SGD)(
            parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.beta1, 0.999),
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "nadam":
        return lambda parameters: untraced(torch.optim.NAdam)(parameters, **common)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
    return lambda parameters: in_one_kernel(kind, parameters, **common)


def in_one_kernel(kind: type[torch.optim.Adam], parameters: Iterable[Parameter], **options: Any) -> torch.optim.Adam:
    """An Adam whose step is one kernel where torch has it: on a CPU a fifth of the time of a kernel a tensor."""
    parameters = list(parameters)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return untraced(kind)(parameters, fused=fused, **options)


def untraced(kind: type[Kind]) -> type[Kind]:
    """The same optimizer, without what torch has around its methods for torch.compile, which is not used on them.

    That imports the compiler at the first call: a second and 40 MB in every process. (An optimizer that a user's own
    factory makes does so all the same.)
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def schedule(config: Config, total: int) -> Schedule:
    """Rise linearly over optimizer.warmup batches; then stay, fall towards 0 (linearly, as a cosine), or fall in steps.

    The last batch, `total`, still counts; 0 is where the next one would be. A step is to a tenth, behind each batch of
    optimizer.drops.
    """
    kind, warmup, drops = config.optimizer.schedule, config.optimizer.warmup, config.optimizer.drops

    def factor(batch: int) -> float:
        if batch <= warmup:
            return batch / (warmup + 1)
        done = (batch - 1 - warmup) / max(1, total - warmup)
        if kind == "linear":
            return max(0.0, 1.0 - done)
        if kind == "steps":
            return float(0.1 ** sum(batch > drop for drop in drops))
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))) if kind == "cosine" else 1.0

    return factor


def momentum_of(group: Mapping[str, Any]) -> float:
    """β, the part of an update that goes on into the next: of Adam and its like, of SGD; 0 if there is none."""
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def made_by(factory: OptimizerFactory, own: list[Parameter]) -> torch.optim.Optimizer:
    """What a user's factory makes of a stage's weights. Raises ConfigError unless it is a stage's own optimizer."""
    made = factory(own)
    if not isinstance(made, torch.optim.Optimizer) or isinstance(made, torch.optim.LBFGS):
        raise ConfigError(
            f"optimizer made a {type(made).__name__}: expected an optimizer whose step() asks for nothing, as "
            "torch.optim.AdamW(parameters, 1e-3); a factor on its rate is schedule=, batch id -> factor"
        )
    known = set(map(id, own))
    if any(id(p) not in known for group in made.param_groups for p in group["params"]):
        raise ConfigError(
            "the optimizer holds weights that are not this stage's: make it of those that it is given, as "
            "lambda parameters: torch.optim.AdamW(parameters, 1e-3)"
        )
    return made


class Descent:
    """A stage's optimizer: on which batches it steps, and how far.

    Args:
        optimizer: of the stage's parameters.
        schedule: batch id -> factor on its learning rates.
        clip: largest norm of the gradient; 0 is no limit.
        accumulate: M, batches whose gradients, averaged, make one update. Ids decide where one ends, so the parameters'
            grad is all that a checkpoint in the middle of an update has to keep. (A batch skipped there lets what was
            gathered wait for the next such id.)
        reschedule: S, batches over which an update that comes τ updates late has its rate multiplied by τ^-(1 - id/S):
            lr/τ at the start, lr from batch S on (PipeMare, arXiv:1910.05124, T1).
        lookahead: most updates by which `lean` moves ahead. Without momentum there is nothing to go by, and it is 0.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule = lambda batch: 1.0,
        clip: float = 0.0,
        accumulate: int = 1,
        reschedule: int = 0,
        lookahead: int = 0,
    ) -> None:
        self.optimizer, self.schedule, self.clip = optimizer, schedule, clip
        self.accumulate, self.reschedule = accumulate, reschedule
        self.lookahead = lookahead if any(map(momentum_of, optimizer.param_groups)) else 0
        self._followed, self._height = 0, 0.0  # the schedule up to this batch, and its largest factor
        self._moved: list[Tensor] = []  # by the last update, parameter by parameter; kept for lookahead only
        self._upright: list[Tensor] = []  # the weights, while the parameters lean
        self._base_lr = [group["lr"] for group in optimizer.param_groups]

    def step(self, batch: int, late: int = 0) -> bool:
        """Update with what is in the parameters' grad, the batch's own included, unless more is to come: was it done?

        late: how many updates this stage made between the batch's forward and now.
        """
        self.stand()
        if batch % self.accumulate:
            return False
        parameters = self.parameters
        if self.accumulate > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.accumulate
        if self.clip:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        factor = self.schedule(batch) * self._slowed(batch, late)
        for group, lr in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = lr * factor
        before = [p.detach().clone() for p in parameters] if self.lookahead else []
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._moved = [p.detach() - was for p, was in zip(parameters, before, strict=True)] if before else []
        return True

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def lean(self, late: int) -> None:
        """Move the parameters to where they are expected when a gradient that is `late` updates late comes, until the
        next `step` or `stand`: on by (β + β² + … + βⁿ) times the last update, n the lesser of late and lookahead.

        That is what the optimizer's momentum β will still make of what it has seen (SpecTrain, arXiv:1809.02839, eq. 5;
        with n = 1, Nesterov's). Without it, a late gradient and momentum swing up in every direction of some curvature.
        """
        if not self._moved or late <= 0:
            return
        self._upright = [p.detach().clone() for p in self.parameters]
        moved = iter(self._moved)
        for group in self.optimizer.param_groups:
            beta = momentum_of(group)
            part = sum(beta**n for n in range(1, 1 + min(late, self.lookahead)))
            for parameter in group["params"]:
                parameter.add_(next(moved), alpha=part)

    @torch.no_grad()
    def stand(self) -> None:
        """Put the parameters back, bitwise, if they lean. What was computed with them must be backpropagated before."""
        if self._upright:
            for parameter, weights in zip(self.parameters, self._upright, strict=True):
                parameter.copy_(weights)
            self._upright = []

    def join(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: float, age: int, batch: int
    ) -> None:
        """Let gradients that come `age` batches late, so much of each, join the next update, when `batch` was the last.

        At the schedule's height that is w / √(1 + age). How far a stage moves in one batch falls with the rate, and how
        far while the gradient is on its way as much; with f, the part of its height that the rate has, it rises to 1 as
        (1 + f (1/w² - 1) + f² age/w²)^-½.
        """
        fallen = self._fallen(batch)
        part = (1.0 + fallen * (weight**-2 - 1.0) + fallen**2 * age * weight**-2) ** -0.5
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(gradient, alpha=part)

    def _fallen(self, batch: int) -> float:
        """What is left of the largest factor that the schedule has had up to here; 1 while it rises."""
        while self._followed < batch:
            self._followed += 1
            self._height = max(self._height, self.schedule(self._followed))
        return self.schedule(batch) / self._height if self._height else 1.0

    def _slowed(self, batch: int, late: int) -> float:
        return float(late ** (batch / self.reschedule - 1.0)) if late > 1 and batch < self.reschedule else 1.0
