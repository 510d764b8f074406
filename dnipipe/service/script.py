"""Stage 0's script where other stages may be away: an evaluation that lost an answer is asked again at the end.

asked ─► lost ─► asked ─► lost … ─► answered: the run ends
         └──── service.patience without an answer ────► WaitTimeout
"""

from __future__ import annotations

from collections.abc import Iterator

from dnipipe.errors import CheckpointError, WaitTimeout
from dnipipe.head import Head
from dnipipe.messages import Answer, Message

RETRY = 2.0  # seconds until the last evaluation is asked again


class PatientHead(Head):
    """A Head (see there) whose answers may never come. `lost` counts evaluations without a result."""

    lost = 0
    _unanswered: float | None = None  # since when every answer to this evaluation was lost

    def take(self, message: Message) -> None:
        if isinstance(message, Answer) and message.h.numel():
            self._unanswered = None
        elif isinstance(message, Answer):
            if self._unanswered is None:
                self._unanswered = self.metrics.clock.now()
            self._lost(message.batch)
        super().take(message)

    def _lost(self, number: int) -> None:
        for batch, ids in list(self._open.items()):
            if number in ids:
                del self._open[batch]
                self.lost += 1
                self.display.note(f"evaluation at batch {batch}: an answer was lost with the stage that had it")

    def _evaluate(self, batch: int) -> Iterator[Message | None]:
        """As often as it takes, at the end of the run; once before."""
        now, self._unanswered = self.metrics.clock.now, None
        while True:
            lost = self.lost
            yield from super()._evaluate(batch)
            if batch < self.total:
                return
            while batch in self._open and not self.interrupted:
                yield None
            if self.lost == lost or self.interrupted:
                return
            self._check_patience()
            again = now() + RETRY
            while now() < again:
                yield None

    def _check_patience(self) -> None:
        """The stage before the one that is away ends all sooner, and says who it is; but not while that one comes and
        goes, nor if it missed the run's last batches: then it takes this for an evaluation in the middle.
        """
        if self._unanswered is None:
            return
        waited, limit = self.metrics.clock.now() - self._unanswered, self.config.service.patience
        if waited >= limit:
            raise WaitTimeout(
                f"stage 0 waited {waited:.0f} s for an answer to the last evaluation (service.patience = {limit:g}): a "
                "stage behind it is away, or dies of it"
            )

    def _complete(self, batch: int) -> None:
        try:
            super()._complete(batch)
        except CheckpointError as error:  # stages on folders of their own: each has its state, none the whole
            self.display.note(f"checkpoint of batch {batch} is not whole: {error}")


__all__ = ["PatientHead"]
