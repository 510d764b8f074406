"""The loop of an independent stage that guesses its own inputs (rule.forward_unlock): no neighbour's absence stops it.

stage before away   it goes on with batches that it draws itself (drawing.py), for at most `unguided` of them, then
                    waits; the stages behind it are fed by it. Whatever of this is late when the neighbour is back is
                    answered, so that nobody waits for it, and not trained on again.
next stage away     as any Keeper. What it is sent first is a batch's Input, so that is what is answered here.
"""

from __future__ import annotations

from typing import Any

from dnipipe.errors import MessageError
from dnipipe.messages import Activation, Gradient, Input, Message
from dnipipe.service.drawing import Draws
from dnipipe.service.keeper import Keeper
from dnipipe.transport import Side
from dnipipe.unlocked import UnlockedStage

LATE = "a batch that was drawn here while the stage before was away"
SOON = 0.001  # seconds: what comes from the next stage is looked for between two draws


class GuessingKeeper(Keeper):
    """A Keeper (see there) of an UnlockedStage.

    Args:
        draws: None for stage 0, which draws all that it trains on in any case.
    """

    stage: UnlockedStage

    def __init__(self, *arguments: Any, draws: Draws | None, **options: Any) -> None:
        self.draws = draws
        self.trained = Input if draws else Activation
        super().__init__(*arguments, **options)

    # -- the stage before is away ------------------------------------------------------------------------------

    def _next(self) -> Message | None:
        message = super()._next()
        return self.draws.next(self.stage.last_batch) if message is None and self.draws and self._alone() else message

    def _until_due(self) -> float:
        return SOON if self._alone() else super()._until_due()

    def _alone(self) -> bool:
        """Whether it may draw its next batch; not before it has been said that the stage before is gone."""
        known = not (self.links.up(Side.PREVIOUS) or self.links.events)
        away = known and self.draws is not None and self.draws.left > 0
        return away and not (self.stopping or self.finished) and self.stage.last_batch < self.total and self._room()

    def _meanwhile(self) -> str:
        if not (self.draws and self.draws.left):
            return super()._meanwhile()
        return (
            f"going on with {self.draws.left} batches that are drawn here (service.unguided_batches), then "
            f"{super()._meanwhile()}"
        )

    def _back(self, side: Side) -> None:
        super()._back(side)
        if side is Side.PREVIOUS and self.draws and self.draws.count:
            self.say(f"{self.draws.count} batches were drawn here meanwhile")

    def _tick(self) -> None:
        super()._tick()
        if self.draws and self.draws.count and not self.links.up(Side.PREVIOUS):
            self.news.away(self._turned, self.index - 1, self.draws.left)

    # -- batches -----------------------------------------------------------------------------------------------

    def _begin(self, batch: int) -> None:
        self.ledger.begun(batch, self.draws is not None and batch == self.draws.last)

    def _declined(self, side: Side, message: Activation | Input) -> bool:
        if self.draws is None:
            return super()._declined(side, message)
        if isinstance(message, Activation):  # its Input came before, and was answered if it was late
            late = message.batch < self.stage.last_batch
        else:
            try:
                assert self.stage.inputs
                self.stage.inputs.check(message.x)
            except MessageError as error:
                self._refuse(side, str(error))
                return True
            self.draws.came(message)
            late = message.batch <= self.stage.last_batch
            if late:
                self.send(Gradient(message.batch, None))
        if late:
            self.links.dropped[LATE] += 1
        return late

    def send(self, message: Message) -> None:
        if self.links.up(Side.NEXT) or not isinstance(message, (Activation, Input)):
            super().send(message)
        elif isinstance(message, Input):  # of a batch that is not drawn by p_update nothing else is sent
            self.stand_in.trained(message.batch)


__all__ = ["GuessingKeeper"]
