"""One process of the pipeline at work: the loop that gives the stage its messages and sends what it yields.

    for message in self.inbox():
        for out in self.stage.handle(message):
            self.send(out)

The inbox blocks, and never spins: a message from the next stage comes first (it frees the window and teaches), then, if
the window has room, one from the stage before, or at stage 0 the next of the script; before it waits, what the
predictor has put off. Each wait has a limit, and whom it waits for is said when it strikes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from dnipipe.errors import DnipipeError, PeerLost, PeerStopped, RunError, WaitTimeout, told
from dnipipe.greeting import greet
from dnipipe.head import Head
from dnipipe.measured import MeasuredTransport
from dnipipe.messages import (
    Activation,
    Checkpoint,
    Evaluation,
    Gradient,
    Hello,
    Input,
    Labels,
    Message,
    Report,
    Saved,
    Stop,
)
from dnipipe.metrics import JsonLines, StageMetrics
from dnipipe.stage import Stage
from dnipipe.tracing.writer import Trace
from dnipipe.transport import Side, Transport
from dnipipe.window import Window

GRACE = 20.0  # seconds in which an interrupted run must have ended in order
TOLD_EVERY = 1.0  # seconds, at least, between two reports to stage 0: each passes through every stage before this one


class Worker:
    """A stage, its transport, and the loop between them.

    Args:
        save: writes the stage's part of the checkpoint of a batch.
        timeout: the longest wait for a neighbour, seconds.
        head: stage 0's script; None elsewhere.
        trace: where every span and message is written down.
        report_every: seconds between two lines of metrics.
    """

    limit_name = "transport.timeout"  # the setting of `timeout`

    def __init__(
        self,
        stage: Stage,
        transport: Transport,
        window: Window,
        metrics: StageMetrics,
        log: JsonLines,
        save: Callable[[int], None],
        *,
        timeout: float,
        report_every: float,
        head: Head | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.stage, self.window, self.metrics, self.log = stage, window, metrics, log
        self.transport = MeasuredTransport(transport, stage.index, metrics.clock, trace)
        self.save, self.timeout, self.report_every, self.head, self.trace = save, timeout, report_every, head, trace
        self.stopping = False  # Stop has been seen: nothing more comes from before
        self.finals = 0  # final reports that came up from the stages behind
        self.interrupted_at: float | None = None
        self._asked_to_stop = False
        self._waiting_since: float | None = None
        self._next_report = time.monotonic() + report_every
        self._next_told = 0.0
        self._starved: set[int] = set()  # batches for which this stage sat idle
        self._heard = {Side.PREVIOUS: 0, Side.NEXT: 0}  # last batch id that each neighbour spoke of
        self._neighbours = [Side.NEXT] * (not stage.last) + [Side.PREVIOUS] * (stage.index > 0)
        self._parent = os.getppid()

    @property
    def index(self) -> int:
        return self.stage.index

    def run(self) -> None:
        """Work until Stop has passed and every batch has its answer; then report for the last time.

        Raises whatever ends the run early, after telling both neighbours why.
        """
        self.metrics.begin()
        self.metrics.clock.record = self.trace.span if self.trace else None
        try:
            for message in self.inbox():
                self._handle(message)
            self._finish()
        except BaseException as error:
            cause = self._first_cause(error)
            self._tell(cause)
            if cause is error:
                raise
            raise cause from error

    def _handle(self, message: Message) -> None:
        # of training: the ids of evaluations are their own
        self.metrics.clock.batch = (
            message.batch if isinstance(message, (Activation, Input, Labels, Gradient, Checkpoint)) else 0
        )
        with self.metrics.clock.span("keep"):
            for out in self._outs(message):
                self.send(out)
        self.metrics.clock.batch = 0

    def _outs(self, message: Message) -> Iterator[Message]:
        """What the stage yields because of it."""
        return self.stage.handle(message)

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Route what the stage yields: batches and markers down, the rest up; at stage 0 its head takes that."""
        if isinstance(message, (Activation, Input, Labels, Evaluation, Checkpoint)):
            self.transport.send(Side.NEXT, message)
            return
        if isinstance(message, Gradient) and message.batch in self._starved:
            self._starved.discard(message.batch)
            message = replace(message, starved=True)
        if isinstance(message, Saved) and message.stage == self.index:
            with self.metrics.clock.span("checkpoint"):
                try:
                    self.save(message.batch)
                except OSError as error:
                    raise RunError(f"cannot save the checkpoint of batch {message.batch}: {error}") from error
        if self.head:
            with self.metrics.clock.span("report"):
                self.head.take(message)
        else:
            self.transport.send(Side.PREVIOUS, message)

    def _first_cause(self, error: BaseException) -> BaseException:
        """Of a neighbour that failed, the end of the connection may be noticed before the reason that it sent."""
        if isinstance(error, PeerLost):
            for side in self._neighbours:
                with contextlib.suppress(DnipipeError):
                    while got := self.transport.receive([side], 0.0):
                        if isinstance(got[1], Stop) and got[1].reason:
                            return PeerStopped(got[1].reason)
        return error

    def _tell(self, error: BaseException) -> None:
        """Best effort: both neighbours learn at once why this stage ends; the first cause, however far it travels."""
        reason = str(error) if isinstance(error, PeerStopped) else f"stage {self.index}: {told(error)}"
        for side in self._neighbours:
            with contextlib.suppress(DnipipeError):
                self.transport.send(side, Stop(self.stage.last_batch, reason))

    # -- receiving ---------------------------------------------------------------------------------------------

    def inbox(self) -> Iterator[Message]:
        """Messages for the stage, until nothing more is to come."""
        while not (self.stopping and self.stage.in_flight == 0):
            with self.metrics.clock.span("loop"):
                message = self._next()
                if isinstance(message, Stop):
                    self._stop(message)
                    continue
                if message is None or self._is_final(message):
                    continue
            yield message

    def _next(self) -> Message | None:
        """The next message, if one comes before something else is due (a report, a limit)."""
        self._tick()
        room = self._room()
        feeding = self.head is not None and room and not self.stopping
        sides, wait = self._sides(room), self.metrics.clock.span(self._awaited(room))
        waits = wait.entered
        got = self.transport.receive(sides, 0.0 if feeding or self.stage.behind else self._until_due(), wait)
        if got is None and feeding:
            assert self.head is not None
            with self.metrics.clock.span("data"):
                fed = self.head.next()
            if fed is not None:
                self._waiting_since = None
                return fed
        if got is None and self.stage.behind:
            self.stage.catch_up()
            return None
        if got is None and feeding:
            got = self.transport.receive(sides, self._until_due(), wait)
        waited = wait.entered > waits
        return self._received(*got, waited, room) if got else None

    def _room(self) -> bool:
        """Whether another batch may come."""
        return self.stage.room(self.window)

    def _awaited(self, room: bool) -> str:
        """What a wait that begins now is for, as the clock calls it."""
        return "wait_end" if self.stopping else "wait_input" if room else "wait_window"

    def _until_due(self) -> float:
        """Seconds until a report or a limit is: no wait is longer. Never 0, which means to look and not to wait."""
        due = [self._next_report]
        if self._waiting_since is not None:
            due.append(self._waiting_since + self.timeout)
        if self.interrupted_at is not None:
            due.append(self.interrupted_at + GRACE)
        return max(0.001, min(due) - time.monotonic())

    def _received(self, side: Side, message: Message, waited: bool, room: bool) -> Message | None:
        self._waiting_since = None
        if isinstance(message, (Activation, Input, Labels, Gradient)):
            self._heard[side] = message.batch
        if waited and isinstance(message, (Activation, Input)) and message.batch > self.stage.last_batch:
            self._starved.add(message.batch)
        if isinstance(message, Gradient):
            clock = self.metrics.clock
            times = {"now": clock.now(), "waited": clock.span("wait_window").seconds}
            self.window.answered(starved=message.starved, blocked=waited and not room, **times)
        return message

    def _sides(self, room: bool) -> list[Side]:
        """Where something may come from; the next stage first."""
        closed = not room or self.stopping
        return [side for side in self._neighbours if not (closed and side is Side.PREVIOUS)]

    def _is_final(self, message: Message) -> bool:
        """Final reports are for `_finish`; one may come while this stage still waits for its last gradients."""
        if isinstance(message, Report) and message.final:
            self.finals += 1
            self.send(message)
            return True
        return False

    # -- ending ------------------------------------------------------------------------------------------------

    def _stop(self, message: Stop) -> None:
        """From before, or from the script: the end. From behind: a wish to end, or the reason of a failure."""
        if message.reason:
            raise PeerStopped(message.reason)
        if message.batch < 0:
            self.interrupt()
        else:
            self.stopping = True
            if not self.stage.last:
                self.transport.send(Side.NEXT, message)

    def interrupt(self) -> None:
        """End soon and in order. Only stage 0 can begin that, so any other passes the wish up. For signal handlers:
        sets a flag and wakes the loop."""
        if self.interrupted_at is None:
            self.interrupted_at = time.monotonic()
        self.transport.wake()

    def _finish(self) -> None:
        """The stages behind report for the last time, and then this one does, so that stage 0 has all of them."""
        while self.finals < self.stage.stages - 1 - self.index:
            message = self._next()
            if isinstance(message, Stop):
                self._stop(message)
            elif message is not None and not self._is_final(message):
                self._handle(message)
        self._report()
        untraced = {"untraced": float(self.trace.dropped)} if self.trace else {}
        self.send(Report(self.index, self.stage.last_batch, self.metrics.totals() | untraced, final=True))

    # -- limits and reports ------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """What is due between two messages: the limits, and a line of metrics."""
        now = time.monotonic()
        if self.interrupted_at is not None:
            self._hurry(now)
        if now >= self._next_report:
            self._next_report = now + self.report_every
            self._report()
            if os.getppid() != self._parent:
                raise PeerLost(f"stage {self.index} ends: the process that started it is gone")
        if self._waiting_since is None:
            self._waiting_since = now
        elif now >= self._waiting_since + self.timeout:
            raise WaitTimeout(self._whom(now - self._waiting_since))

    def _hurry(self, now: float) -> None:
        if not self._asked_to_stop and not self.stopping:
            self._asked_to_stop = True
            if self.head:
                self.head.interrupt()
            else:
                self.transport.send(Side.PREVIOUS, Stop(-1))
        assert self.interrupted_at is not None
        if now >= self.interrupted_at + GRACE:
            raise WaitTimeout(f"not ended {GRACE:g} s after it was asked to: {self._whom(now - self.interrupted_at)}")

    def _whom(self, seconds: float) -> str:
        """Who waited for whom, since when, and the last batch id of both."""
        behind = self.index == 0 or (not self.stage.last and (self.stage.in_flight > 0 or self.stopping))
        side, whom = (Side.NEXT, self.index + 1) if behind else (Side.PREVIOUS, self.index - 1)
        what = f"an answer to batch {min(self.stage.pending, default=self.stage.last_batch)}" if behind else "a batch"
        return (
            f"stage {self.index} waited {seconds:.0f} s for {what} from stage {whom} ({self.limit_name} = "
            f"{self.timeout:g}); last batch here {self.stage.last_batch}, last heard of from it {self._heard[side]}"
        )

    def _report(self) -> None:
        """A line of metrics, and one more for each evaluation that finds no room in it."""
        for _ in range(max(1, self.metrics.unread)):
            self._report_line()

    def _report_line(self) -> None:
        with self.metrics.clock.span("report"):
            numbers = self.metrics.numbers(self.stage.in_flight, self.window.size)
            self.log.write(self.stage.last_batch, numbers)
            if self.trace:
                self.trace.flush()
        now = time.monotonic()
        if now >= self._next_told or self.stopping or "eval.loss" in numbers:
            self._next_told = now + TOLD_EVERY
            self.send(Report(self.index, self.stage.last_batch, numbers))

    # -- the first words ---------------------------------------------------------------------------------------

    def greet(self, mine: dict[Side, Hello]) -> None:
        """Exchange Hello on each side (greeting.py). Raises HandshakeError, WaitTimeout."""
        greet(self.transport, mine, self.timeout, lambda: self.interrupted_at is not None)


__all__ = ["Worker"]
