"""A worker under observation: alone, with both neighbours in the test's hands, or a whole line of them in threads.

Bench    before ──► stage 1 of 3 ──► behind        the test speaks for `before` and `behind`, all in one thread:
                ◄──              ◄──               what is to happen while the stage waits, happens when it waits
Crew     stage 0 ──► … ──► stage K-1               a thread each; stage 0 has a Script
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from dnipipe.gradient_rules import Delayed, GradientRule, Synthetic
from dnipipe.learner import Learner
from dnipipe.messages import Activation, Answer, Checkpoint, Evaluation, Gradient, Message, Report, Saved, Stop
from dnipipe.metrics import JsonLines
from dnipipe.predictors import VFBN
from dnipipe.stage import Stage
from dnipipe.tracing import Trace
from dnipipe.transport import AT_EASE, Side
from dnipipe.transport.local import LocalTransport, pipeline
from dnipipe.window import Window
from dnipipe.worker import Worker
from tests.conftest import blobs, make_stages

NEVER = 1e6  # seconds


def said(message: Message) -> str:
    """Short: the kind, the batch, for a report the stage."""
    if isinstance(message, (Report, Saved)):
        return f"{type(message).__name__} {message.batch} of {message.stage}" + " final" * getattr(message, "final", 0)
    return f"{type(message).__name__} {getattr(message, 'batch', '')}".strip()


class Watched:
    """A transport that writes down what its owner does, and makes happen what is to come `late`: once it waits."""

    def __init__(self, inner: LocalTransport) -> None:
        self.inner = inner
        self.log: list[str] = []
        self.asked: list[tuple[Side, ...]] = []  # the sides of each receive
        self.late: deque[Callable[[], object]] = deque()  # one each wait
        self.before_send: Callable[[Side, Message], object] = lambda side, message: None
        self.after_send: Callable[[Side, Message], object] = lambda side, message: None
        self.before_receive: Callable[[], object] = lambda: None
        self.got = 0

    def send(self, side: Side, message: Message) -> None:
        self.before_send(side, message)
        self.log.append(f"to {side.value}: {said(message)}")
        self.inner.send(side, message)
        self.after_send(side, message)

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        self.before_receive()
        self.asked.append(tuple(sides))
        got = self.inner.receive(sides, timeout, self._within(waiting))
        if got is not None:
            self.got += 1
            self.log.append(f"from {got[0].value}: {said(got[1])}")
        return got

    @contextmanager
    def _within(self, waiting: AbstractContextManager[object]) -> Iterator[None]:
        with waiting:
            if self.late:
                self.late.popleft()()
            yield

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


class Script:
    """A fake head: these messages, then Stop; None waits for an Answer. Interrupted, it saves and stops."""

    def __init__(self, messages: Iterable[Message | None]) -> None:
        self.messages, self.batch = messages, 0
        self.interrupted = False
        self.asked = 0
        self.taken: list[Message] = []
        self._script = self._run()

    def _run(self) -> Iterator[Message | None]:
        for message in self.messages:
            if self.interrupted:
                yield Checkpoint(self.batch)
                break
            self.batch = message.batch if isinstance(message, Activation) else self.batch
            yield message
            while message is None and not any(isinstance(each, Answer) for each in self.taken):
                yield None
        yield Stop(self.batch)

    def next(self) -> Message | None:
        self.asked += 1
        return next(self._script)

    def take(self, message: Message) -> None:
        self.taken.append(message)

    def interrupt(self) -> None:
        self.interrupted = True

    def finals(self) -> list[int]:
        return [each.stage for each in self.taken if isinstance(each, Report) and each.final]


def modules_of(stages: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(8, 8 if k < stages - 1 else 3) for k in range(stages)]


def batches(first: int, last: int) -> list[Activation]:
    return [Activation(batch, x, y) for batch, (x, y) in enumerate(blobs(last - first + 1, 4), start=first)]


def wait(k: int = 0) -> GradientRule:
    return Delayed()


def synthetic(k: int = 0) -> GradientRule:
    """Updates at once, so that several batches are in flight."""
    return Synthetic(Learner(VFBN(nn.Linear(8, 3), F.cross_entropy, 0.0), 1e-3))


def answer(message: Message) -> Message | None:
    """What a last stage, number 2, would say at once."""
    if isinstance(message, Activation):
        return Gradient(message.batch, torch.zeros_like(message.x))
    if isinstance(message, Evaluation):
        return Answer(message.batch, torch.zeros(4))
    if isinstance(message, Checkpoint):
        return Saved(message.batch, 2)
    return Report(2, message.batch, final=True) if isinstance(message, Stop) else None


def a_worker(stage: Stage, wire: Watched, folder: Path, **options: Any) -> Worker:
    """Its saves go into wire.log."""
    window = options.pop("window", 1)
    log = JsonLines(folder / f"stage-{stage.index}.jsonl")
    save = options.pop("save", lambda batch: wire.log.append(f"saved {batch}"))
    path = folder / "trace" / f"stage-{stage.index}.jsonl"
    trace = Trace(path, stage.index, stage.stages) if options.pop("traced", False) else None
    options = {"timeout": 60.0, "report_every": NEVER, "trace": trace} | options
    return Worker(
        stage, wire, window if isinstance(window, Window) else Window(window), stage.metrics, log, save, **options
    )


class Bench:
    """Stage `index` of 3 with its neighbours' ends of the transport."""

    def __init__(
        self, folder: Path, index: int = 1, rule: Callable[[int], GradientRule] = wait, **options: Any
    ) -> None:
        self.ends = pipeline(3, timeout=30.0)
        self.wire = Watched(self.ends[index])
        kind = options.pop("kind", lambda k: Stage)
        stages = make_stages(modules_of(3), rule, partial(torch.optim.SGD, lr=0.1), kind=kind)
        self.worker = a_worker(stages[index], self.wire, folder, **options)
        self.index = index

    def close(self) -> None:
        self.worker.log.close()

    def previous(self, *messages: Message) -> None:
        """The stage before says this."""
        for message in messages:
            self.ends[self.index - 1].send(Side.NEXT, message)

    def next(self, *messages: Message) -> None:
        """The next stage says this."""
        for message in messages:
            self.ends[self.index + 1].send(Side.PREVIOUS, message)

    def next_answers(self) -> Bench:
        """From now on at once, whatever it is sent."""

        def reply(side: Side, message: Message) -> None:
            if side is Side.NEXT and (word := answer(message)):
                self.next(word)

        self.wire.after_send = reply
        return self

    def heard(self, side: Side) -> list[Message]:
        """What the neighbour on that side was sent."""
        end, from_side = (self.index + 1, Side.PREVIOUS) if side is Side.NEXT else (self.index - 1, Side.NEXT)
        found = []
        while got := self.ends[end].receive([from_side], 0.0):
            found.append(got[1])
        return found

    def log(self, beginning: str) -> list[str]:
        return [line.removeprefix(beginning) for line in self.wire.log if line.startswith(beginning)]


class Crew:
    """K workers, a thread each; one that ends closes its transport, as a process does."""

    def __init__(
        self, folder: Path, script: Script, stages: int, rule: Callable[[int], GradientRule], **options: Any
    ) -> None:
        made = make_stages(modules_of(stages), rule, partial(torch.optim.SGD, lr=0.1))
        self.script = script
        self.wires = [Watched(end) for end in pipeline(stages, timeout=30.0)]
        self.workers = [
            a_worker(stage, wire, folder, head=script if stage.index == 0 else None, **options)
            for stage, wire in zip(made, self.wires, strict=True)
        ]

    def run(self) -> list[BaseException | None]:
        """How each one ended: None in order, or what it raised."""
        ends: list[BaseException | None] = [None] * len(self.workers)

        def work(worker: Worker, wire: Watched) -> None:
            try:
                worker.run()
            except BaseException as error:
                ends[worker.index] = error
            finally:
                wire.close()
                worker.log.close()
                if worker.trace:
                    worker.trace.close()

        pairs = zip(self.workers, self.wires, strict=True)
        threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in threads)
        return ends
