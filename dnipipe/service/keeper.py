"""The loop of an independent stage: a Worker whose neighbours may go away and come back.

next stage away     each batch under way, and each new one, is answered here: no gradient came. So the stage goes on
                    learning from its predictor, for at most `unguided` batches; then it takes no more until the
                    neighbour is back. Evaluations are answered as lost.
stage before away   nothing comes: it waits, or goes on with guesses (guessing.py). What it would send up is dropped;
                    none of it is needed for ever.
too long away       who has trained all that it may, and then waited for `patience`, ends, and so do all others.
back                stage k tells k+1 the agreement again, and that the run has ended, if it has.
at the end          a stage stays until stage 0 says farewell: who returns late must find what was already said.

A neighbour that is connected but says nothing, not even the Link that every loop sends twice a second, is taken for
hung: by the stage before it and by the one behind it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch

from dnipipe.errors import HandshakeError, MessageError, NonFiniteLoss, PeerStopped, WaitTimeout
from dnipipe.expected import WRONG
from dnipipe.messages import (
    Activation,
    Agreed,
    Answer,
    Evaluation,
    Farewell,
    Gradient,
    Input,
    Message,
    Report,
    Stop,
    Upward,
)
from dnipipe.service.absence import Absence
from dnipipe.service.ledger import Ledger
from dnipipe.service.limits import STOOD, TURN, Limit, Pace, of_silence
from dnipipe.service.links import Gone, Links
from dnipipe.service.standin import News, StandIn
from dnipipe.transport import Side
from dnipipe.worker import Worker


class AskedToEnd(Exception):
    """SIGTERM or Ctrl-C: this stage ends, the others do not."""


class Keeper(Worker):
    """A Worker (see there) at edges that come and go.

    Args:
        links: its edges; what `transport` is made of. agreement: for the next stage, whenever it comes.
        first: what was heard before there was a Keeper.
        total: the last batch id of the run.
        unguided: batches that it trains while the next stage is away. patience: seconds that it waits for a neighbour.
        silence: seconds, at least, after which a connected neighbour that says nothing is taken for hung.
        hung: seconds, at least, after which a process whose loop stands ends itself.
        save_own: writes the stage's own state. save_every: seconds between two.
        over: called when the run has ended for every stage; stage 0 writes the summary.
        alive: told that the loop goes round, and how long it may stand. say: takes a line for a person.
    """

    limit_name = "service.patience"
    trained: type[Activation] | type[Input] = Activation  # what brings a batch to train on

    def __init__(
        self,
        *arguments: Any,
        links: Links,
        ledger: Ledger,
        agreement: Agreed,
        total: int,
        unguided: int,
        patience: float,
        silence: float,
        hung: float,
        save_own: Callable[[], object],
        over: Callable[[], None],
        save_every: float,
        alive: Callable[[Limit], None],
        say: Callable[[str], None],
        first: tuple[Side, Message] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **{**options, "timeout": patience})
        self.links, self.ledger, self.agreement = links, ledger, agreement
        self.total, self.patience = total, patience
        self.silence, self.hung = silence, hung
        self.save_own, self.over, self.save_every, self.alive, self.say = save_own, over, save_every, alive, say
        self.first = first
        self.absence, self.pace = Absence(self.index, patience), Pace(hung)
        self.stand_in, self.news = StandIn(unguided, ledger), News(say)
        self.final_reports: dict[int, Report] = {}
        self.finished = self.farewell = False
        self._stays = 0.0  # when it goes without a farewell
        self._turned = time.monotonic()  # when the loop last came round
        self._next_save = self._turned + save_every
        links.events.clear()  # what they told is known here
        links.stood(math.inf)  # nobody listened while the stage was built
        for side in self._neighbours:
            self.absence.gone(side)
            if links.up(side):
                self._back(side)

    # -- the loop ----------------------------------------------------------------------------------------------

    def _next(self) -> Message | None:
        self._attend()
        while self.stand_in.answers:
            self._tick()
            answer = self.stand_in.answers.popleft()
            if self._asked(answer):  # the real one may have come after all
                return answer
        if self.first:
            (side, heard), self.first = self.first, None
            return self._received(side, heard, waited=False, room=True)
        message = super()._next()
        if message is None:  # all that had come was heard before
            self._judge()
        return message

    def _handle(self, message: Message) -> None:
        self._attend()  # now, while the stage knows exactly what is under way: a send in its middle only notes
        self.alive(self.pace.limit(type(message)))
        trains = isinstance(message, self.trained)
        if isinstance(message, self.trained):
            self._begin(message.batch)
            self.links.last = message.batch
        skipped = dict(self.metrics.skipped)
        super()._handle(message)
        self.pace.took(type(message), time.monotonic() - self._turned)
        if trains or isinstance(message, Gradient):
            for why, count in self.metrics.skipped.items():
                if count > skipped.get(why, 0):
                    self.ledger.skipped(getattr(message, "batch", 0), why)
        if trains or (isinstance(message, Evaluation) and self.stage.last_batch < self.total):
            self.absence.worked()

    def _begin(self, batch: int) -> None:
        self.ledger.begun(batch)

    def _room(self) -> bool:
        return super()._room() and (self.stage.last or self.links.up(Side.NEXT) or self.stand_in.left > 0)

    def _until_due(self) -> float:
        return min(TURN, super()._until_due())

    def _sides(self, room: bool) -> list[Side]:
        """Also the stage before, where it has to be greeted, or its farewell is all that is to come."""
        sides = super()._sides(room)
        listens = self.index > 0 and (self.finished or not self.links.up(Side.PREVIOUS))
        return [*sides, Side.PREVIOUS] if listens and Side.PREVIOUS not in sides else sides

    def _received(self, side: Side, message: Message, waited: bool, room: bool) -> Message | None:
        got = super()._received(side, message, waited, room)
        if isinstance(got, Agreed):
            self._check_agreement(got)
            return None
        if isinstance(got, Farewell):
            self.farewell = True
            return None
        if got is not None and not self._asked(got):
            self.links.dropped["an answer to what an older connection brought"] += 1
            return None
        return None if isinstance(got, (Activation, Input)) and self._declined(side, got) else got

    def _declined(self, side: Side, message: Activation | Input) -> bool:
        """Whether the stage is not given a batch, or what follows it; before it stands in the ledger."""
        old = message.batch <= self.stage.last_batch
        if old:
            self._refuse(side, f"batch {message.batch} came after batch {self.stage.last_batch}")
        return old

    def _outs(self, message: Message) -> Iterator[Message]:
        """A message that the stage will not have costs its sender the connection, and not this stage its life."""
        asked = self.stage.pending.get(message.batch) if isinstance(message, Gradient) else None
        try:
            yield from super()._outs(message)
        except MessageError as error:
            side = Side.NEXT if isinstance(message, get_args(Upward)) else Side.PREVIOUS
            if side not in self._neighbours:
                raise  # it is of stage 0's own script
            if isinstance(message, Gradient) and asked:
                self.stage.pending[message.batch] = asked  # still owed, and answered as all are when its sender goes
            self._refuse(side, str(error))

    def _refuse(self, side: Side, why: str) -> None:
        self.links.dropped.note(WRONG, why)
        self.links.give_up(side, f"{self.links.names[side]} sent what was not agreed on: {why}")

    def _asked(self, message: Message) -> bool:
        """Whether it is no answer, or one to what is under way here: this process may be another than the one that
        asked, and what was asked over a connection that ended has been answered already.
        """
        if isinstance(message, Gradient):
            return message.batch in self.stage.unanswered
        return not isinstance(message, Answer) or message.batch in self.stage.evaluating

    def _check_agreement(self, theirs: Agreed) -> None:
        if not torch.equal(theirs.x, self.agreement.x):
            raise HandshakeError(
                f"stage {self.index} belongs to another run than stage {self.index - 1}: the stages' folders are of "
                "different runs; give this one the folder of that run, or an empty one (output.run)"
            )

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """What the next stage would answer is answered here while it is away; what else it misses, Links counts."""
        if isinstance(message, Report) and message.final:
            self.final_reports[message.stage] = message
        away = not self.links.up(Side.NEXT)
        if away and isinstance(message, Activation):
            self.stand_in.trained(message.batch)
        elif away and isinstance(message, Evaluation):
            self.stand_in.evaluated(message.batch)
        else:
            super().send(message)

    def _tell(self, error: BaseException) -> None:
        """A stage that fails is missed, and comes back: only one that gave up, or heard of it, ends the others; or that
        has met with a NaN and is to stop: it would again, and who sent it trains on without a use.
        """
        if isinstance(error, (WaitTimeout, PeerStopped, NonFiniteLoss)):
            super()._tell(error)

    # -- neighbours --------------------------------------------------------------------------------------------

    def _attend(self) -> None:
        """What the links have told."""
        while self.links.events:
            side, event = self.links.events.popleft()
            if isinstance(event, Gone):
                self._gone(side, event.why)
            elif self.links.up(side):
                self._back(side)

    def _gone(self, side: Side, why: str) -> None:
        self.absence.gone(side)
        stage = self.index + (1 if side is Side.NEXT else -1)
        waiting = sorted(self.stage.unanswered) if side is Side.NEXT else []
        self.ledger.gone(stage, why, waiting)
        if side is Side.PREVIOUS:
            self.say(f"{why}; {self._meanwhile()}")
            return
        self.stand_in.begin(waiting, sorted(self.stage.evaluating))
        alone = f"{self.stand_in.left} batches (service.unguided_batches)"
        self.say(f"{why}; going on alone for {alone}, then waiting for it")

    def _meanwhile(self) -> str:
        """What it does while the stage before is away."""
        return f"waiting for it, for at most {self.patience:g} s (service.patience)"

    def _back(self, side: Side) -> None:
        self.absence.back(side)
        self._waiting_since = None  # who comes has as long as ever to say something
        stage = self.index + (1 if side is Side.NEXT else -1)
        self.ledger.back(stage, self.links.last_of(side) if side is Side.NEXT else None)
        if side is Side.NEXT:
            alone = self.stand_in.end()
            self.say(f"stage {stage} is there" + (f", after {alone} batches without it" if alone else ""))
            self.links.send(side, self.agreement)
            if self.stopping:
                self.links.send(side, Stop(self.stage.last_batch))
        else:
            self.say(f"stage {stage} is there")
            self._stays = time.monotonic() + self.patience
            for report in self.final_reports.values():
                self.links.send(side, report)

    # -- limits ------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        """A stage goes on without its metrics, if the disk does not take them."""
        try:
            super()._report()
        except OSError as error:
            self.say(f"metrics are not written: {error.strerror}")

    def _tick(self) -> None:
        now = time.monotonic()
        stood, self._turned = now - self._turned, now
        if stood > STOOD:
            self.links.stood(stood)
            self.absence.stood(stood)
        self.absence.check(self._needed())
        super()._tick()
        self.alive(self.pace.limit())
        if now >= self._next_save:
            self._next_save = now + self.save_every
            self.save_own()
        if not self.links.up(Side.NEXT) and self.stand_in.alone:
            self.news.away(now, self.index + 1, self.stand_in.left)

    def _needed(self) -> list[Side]:
        """Neighbours without which the run cannot end; who only has to hear the farewell has a limit of its own."""
        if self.finished:
            return []
        return [side for side in self._neighbours if not (self.stopping and side is Side.PREVIOUS)]

    def _judge(self) -> None:
        """Whether a neighbour hangs; at the end of the run, one may stand while it writes what came of it."""
        for side in self._needed():
            limit = of_silence(self.silence, self.hung, self.links.longest(side))
            if self.links.up(side) and self.links.quiet(side) > limit.seconds:
                stage = self.index + (1 if side is Side.NEXT else -1)
                self.links.give_up(side, f"stage {stage} has said nothing for {limit}: it hangs")

    def _hurry(self, now: float) -> None:
        raise AskedToEnd

    # -- ending ------------------------------------------------------------------------------------------------

    def _is_final(self, message: Message) -> bool:
        if isinstance(message, Report) and message.stage in self.final_reports:
            self.send(message)  # said again, for whoever came back
            return True
        return super()._is_final(message)

    def _finish(self) -> None:
        super()._finish()
        self.finished = True
        self.ledger.ended()
        self.save_own()
        self._stays = time.monotonic() + self.patience
        while self.index > 0 and not self.farewell and time.monotonic() < self._stays:
            message = self._next()
            if isinstance(message, Evaluation):  # stage 0 has come back, and asks once more
                self._stays = time.monotonic() + self.patience
            if isinstance(message, Stop):
                self._stop(message)
            elif message is not None and not self._is_final(message):
                self._handle(message)
        if self.farewell or self.index == 0:
            self.over()  # before anyone goes: who dies here and comes back would find nobody
        else:
            self.say(f"stage {self.index - 1} has not said for {self.patience:g} s that the run is over; this one ends")
        if not self.stage.last:
            self.links.send(Side.NEXT, Farewell(self.stage.last_batch))


__all__ = ["AskedToEnd", "Keeper"]
