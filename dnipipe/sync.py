"""A stage that trains synchronously, through torch.distributed.pipelining: what people use where the link is fast.

    x, y ──► stage 0 ── y ──► stage 1 ── y ──► … ──► stage K-1        Labels: the batch begins, passed on at once
                ├── h0 ──────► ├── h1 ──────► …  ──────► │            each of its M micro-batches, forward and back,
                │ ◄────── g0 ──┤ ◄────── g1 ── …  ◄──────┤            in the order of the schedule (schedules.py)
             update          update                    update         then every stage, once a batch

Everything else is as ever: evaluations, checkpoints, reports and the end travel as messages. Randomness is a function
of (seed, layer, batch id), as in stage.py, and drawn micro-batch by micro-batch: so dropout masks are not those of a
whole batch, and BatchNorm sees the samples of a micro-batch only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.config import Sync
from dnipipe.errors import ConfigError, DataError, MessageError, NonFiniteLoss
from dnipipe.labels import counting, loss_terms
from dnipipe.messages import Activation, Labels, Message
from dnipipe.pairs import joined, parted
from dnipipe.randomness import reseed
from dnipipe.split import Like, Plan
from dnipipe.stage import Stage

SMALLER = "smaller than the first"


class SyncStage(Stage):
    """A Stage whose activations and gradients travel through torch's schedule. `join` comes before the first batch.

    Args:
        settings: [sync]. plan: its shapes are those of every batch. The others are Stage's.

    Raises ConfigError for micro-batches that do not fit the batch, or a device that gloo cannot send from.
    """

    def __init__(self, settings: Sync, plan: Plan, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kind, self.plan = settings.schedule, plan
        self.microbatches = microbatches(settings, plan.stages, plan.x[0])
        if self.beside.device.type != "cpu":
            raise ConfigError(
                f"pipeline.device = {self.beside.device} with rule.name = sync: gloo sends from the main memory alone; "
                "use pipeline.device = cpu"
            )

    def join(self, timeout: float) -> None:
        """Make the schedule, in torch's default process group, whose waits take at most `timeout` seconds."""
        from dnipipe.schedules import Schedule, StaticStage

        x, along = self.plan.input(self.index)
        around = StaticStage(
            self.metrics,
            Apart(self.module),
            self.index,
            self.stages,
            self.beside.device,
            input_args=self._like(x, along, learns=self.index > 0),
            output_args=self._like(self.plan.h(self.index), self.plan.along(self.index), learns=True),
        )
        self.schedule = Schedule(self.kind, around, self.microbatches, self._loss, timeout)

    def _like(self, h: Like, along: Like | None, learns: bool) -> tuple[Tensor, ...]:
        """What one micro-batch of a planned tensor (B, D...) looks like, and of what travels along with it."""

        def part(planned: Like, learns: bool) -> Tensor:
            dtype, shape = planned
            size = (shape[0] // self.microbatches, *shape[1:])
            return torch.empty(size, dtype=getattr(torch, dtype), device="meta", requires_grad=learns)

        return (part(h, learns), part(along, False)) if along else (part(h, learns),)

    # -- training ----------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> Iterator[Message]:
        return self.on_labels(message) if isinstance(message, Labels) else super().handle(message)

    def on_activation(self, message: Activation) -> Iterator[Message]:
        """The batch, at stage 0. Elsewhere none comes this way."""
        if self.index:
            raise MessageError(f"stage {self.index} cannot handle a Activation with rule.name = sync")
        return self._train(message.batch, (message.x, message.along), message.y)

    def on_labels(self, message: Labels) -> Iterator[Message]:
        return self._train(message.batch, (), message.y)

    def _train(self, batch: int, given: tuple[Tensor | None, ...], y: Tensor) -> Iterator[Message]:
        """given: x and what comes along with it, at stage 0."""
        inputs = [tensor for tensor in given if tensor is not None]
        self._check_order(batch)
        smaller = self._check_shapes(batch, inputs, y)
        self.last_batch = batch
        if not self.last:
            yield Labels(batch, y)
        if smaller:
            self.metrics.skip(SMALLER)
            return
        self.passes.mode(training=True)
        reseed(self.passes.seed, self.passes.first_layer, batch)
        self._terms = loss_terms(y)
        self.schedule.step(batch, inputs, y)
        with self.metrics.clock.span("optimizer"):
            self.updates += self.descent.step(batch)
        self.metrics.trained(batch, y.shape[0], at_once=self.last)

    def _check_shapes(self, batch: int, inputs: list[Tensor], y: Tensor) -> bool:
        """Whether the batch has fewer samples, and else is as planned: an epoch's last, which is left out.

        Raises DataError for a batch that has any other shape or dtype.
        """
        planned = [like for like in self.plan.input(0) if like]
        wanted = [(y, (str(y.dtype).removeprefix("torch."), self.plan.y)), *zip(inputs, planned, strict=False)]
        for tensor, (dtype, shape) in wanted:
            name = str(tensor.dtype).removeprefix("torch.")
            if name != dtype or tensor.shape[1:] != shape[1:] or len(tensor) > shape[0]:
                raise DataError(
                    f"batch {batch} is {name} {list(tensor.shape)}, and the first was {dtype} {list(shape)}: "
                    "rule.name = sync has static shapes (torch.distributed.pipelining); give every batch the same, or "
                    "use another rule"
                )
        return y.shape[0] < self.plan.y[0]

    def _loss(self, h: Tensor, y: Tensor) -> Tensor:
        """The mean loss of one micro-batch, in the last stage; weighed, since torch's schedule takes the mean of these
        as the batch's, by its share of the labels that count."""
        if not counting(y).any():
            return h.sum() * 0.0
        value: Tensor = self.loss(h, y)
        if not torch.isfinite(value):
            raise NonFiniteLoss(
                f"the loss is {value.item()} at batch {self.last_batch}: lower optimizer.lr, or set optimizer.clip"
            )
        terms = loss_terms(y)
        self.metrics.loss(value.detach(), terms)
        return value * (self.microbatches * terms / self._terms)


class Apart(nn.Module):
    """Layers as torch's schedule calls them: with the two of a pair (pairs.py) as two arguments."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, along: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        h, along = parted(self.layers(joined(x, along)))
        return h if along is None else (h, along)


def microbatches(settings: Sync, stages: int, samples: int) -> int:
    """M, into which a batch of so many samples is cut. Raises ConfigError if it cannot be.

    The setting; automatic: the largest up to 2 K that divides the batch, or else the smallest above. 1f1b wants K.
    """
    least = stages if settings.schedule == "1f1b" else 1
    fitting = [number for number in range(least, samples + 1) if samples % number == 0]
    asked = settings.microbatches
    if not fitting or (asked and asked not in fitting):
        raise ConfigError(
            f"sync.microbatches = {asked} with sync.schedule = {settings.schedule}, {stages} stages and batches of "
            f"{samples} samples: it must divide the batch and be at least {least}; "
            + (f"use one of {', '.join(map(str, fitting))}" if fitting else "use larger batches, or gpipe")
        )
    return asked or max([number for number in fitting if number <= 2 * stages] or fitting[:1])


__all__ = ["SyncStage", "microbatches"]
