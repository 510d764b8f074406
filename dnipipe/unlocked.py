"""A stage whose forward waits for no other: it trains on a guess of its input, made from the network's own input.

    x, y ──► stage 0 ── x, y ──► stage 1 ── x, y ──► … ──► stage K-1      Input, passed on before anything is computed
                │                   │ ĥ0 = I_1(x), h1 = f_1(ĥ0), and on as ever (stage.py)
                └─────── h0 ───────►│ I_1 learns: ‖I_1(x) − h0‖²            Activation, which nobody waits for

The paper's completely unlocked training (arXiv:1608.05343). What goes back for h0 is the gradient at ĥ0: it teaches the
predictor of the stage before. Evaluations take the real activations all the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dnipipe.errors import MessageError
from dnipipe.inputs import Inputs
from dnipipe.messages import Activation, Gradient, Input, Message
from dnipipe.stage import Stage


class UnlockedStage(Stage):
    """A Stage that trains on Input instead of Activation. Stage 0, whose input needs no guess, begins it.

    A batch that the rule does not draw (`rule.p_update`) finds the stage busy, as in the paper's experiment: it passes
    the Input on, and makes neither forward nor backward; nor does its I_k learn.

    Args:
        inputs: I_k; None for stage 0. The others are Stage's.
    """

    def __init__(self, inputs: Inputs | None, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.inputs = inputs
        self.seen: Tensor | None = None  # x of the last batch, if it was trained on: I_k learns when its h is here
        self.left_out: set[int] = set()  # batches passed on only, which the next stage has not answered

    @property
    def in_flight(self) -> int:
        return super().in_flight + len(self.left_out)

    @property
    def unanswered(self) -> set[int]:
        return super().unanswered | self.left_out

    def handle(self, message: Message) -> Iterator[Message]:
        return self.on_input(message) if isinstance(message, Input) else super().handle(message)

    def on_input(self, message: Input) -> Iterator[Message]:
        batch, x = message.batch, message.x
        self._check_order(batch)
        if self.inputs:
            x = self.beside.bring(x)
            self.inputs.check(x)
        if not self.last:
            yield message
        drawn = self.rule.at(batch).draws(batch)
        self.seen = x if drawn else None
        if not drawn:
            yield from self._leave_out(message)
            return
        if self.inputs:
            with self.metrics.clock.span("predictor"):
                x = self.inputs.guess(x)
        yield from super().on_activation(Activation(batch, x, message.y))

    def on_activation(self, message: Activation) -> Iterator[Message]:
        """At stage 0, the batch. Elsewhere what really came for a batch that was trained on: I_k learns."""
        if self.inputs is None:
            return self.on_input(Input(message.batch, message.x, message.y))
        if message.batch != self.last_batch:
            raise MessageError(f"stage {self.index} had no input of batch {message.batch} before its activation")
        if self.seen is not None and self._usable(message.x, message.batch, "activation"):
            h = self.beside.bring(message.x)
            with self.metrics.clock.span("predictor"):
                self.metrics.input_guessed(self.inputs.learn(self.seen, h), h)
        return iter(())

    def on_gradient(self, message: Gradient) -> Iterator[Message]:
        """For a batch that was left out here there is no h, and so no lesson."""
        if message.batch not in self.left_out:
            return super().on_gradient(message)
        self.left_out.remove(message.batch)
        return iter(())

    def _leave(self, batch: int, y: Tensor, why: str) -> Iterator[Message]:
        """Its Input went on before anything was computed: the next stage answers it all the same."""
        if not self.last:
            self.left_out.add(batch)
        yield from super()._leave(batch, y, why)

    def _leave_out(self, message: Input) -> Iterator[Message]:
        self.last_batch = message.batch
        yield from self._leave(message.batch, message.y, "not drawn")


__all__ = ["UnlockedStage"]
