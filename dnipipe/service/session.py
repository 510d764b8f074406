"""An independent stage from its start to its end.

serve(job, k):  its folder ─► listen, connect ─► the agreement: its own, or from stage k-1 (stage 0 makes it)
                ─► its newest own state ─► (stage 0: what stage 1 has trained) ─► Keeper.run ─► stage 0: the summary
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dnipipe import checkpoint
from dnipipe.agreement import Agreement, agree
from dnipipe.building import Job, build_stage, check_model
from dnipipe.config import Config, shared_settings
from dnipipe.data import Task, drawn
from dnipipe.errors import (
    CheckpointError,
    GaveUp,
    HandshakeError,
    MessageError,
    NonFiniteLoss,
    PeerLost,
    PeerStopped,
    WaitTimeout,
)
from dnipipe.expected import demanded, expected
from dnipipe.greeting import check_settings
from dnipipe.messages import Agreed, Message
from dnipipe.metrics import StageMetrics
from dnipipe.opening import edges_of
from dnipipe.service.drawing import Draws
from dnipipe.service.guessing import GuessingKeeper
from dnipipe.service.keeper import AskedToEnd, Keeper
from dnipipe.service.ledger import NAME, Ledger
from dnipipe.service.limits import Limit
from dnipipe.service.links import Links, Up
from dnipipe.service.place import Place, check, check_free, endpoint, own_endpoint
from dnipipe.service.script import PatientHead
from dnipipe.session import conclude, head_of, interruptible, worker_of
from dnipipe.split import part
from dnipipe.stage import Stage
from dnipipe.state import boundary_of, first_of, load_state, state_of
from dnipipe.transport import Side

GUIDES = ("synthetic", "blend", "local")  # rules with which a stage learns without the next one
KEEP = 2  # of its own states

Heard = tuple[Side, Message]


def serve(job: Job, index: int) -> Path:
    """Stage `index`, until the run ends or it is asked to end. Returns the run's folder.

    Raises DnipipeError when it cannot go on: GaveUp if starting it again would not help, Replaced if another process
    has taken its place.
    """
    try:
        return _serve(job, index)
    except (WaitTimeout, PeerStopped, HandshakeError, NonFiniteLoss) as error:
        raise GaveUp(str(error)) from error


def _serve(job: Job, index: int) -> Path:
    settings, run = job.config, Path(job.config.output.run)
    check(settings, index)
    place = Place.taken(run, index)
    if place.over:
        _say(index, f"the run in {run} is over: for another one, name another output.run")
        return run
    watch = _Watch(place, settings.service.hung, index)
    torch.manual_seed(settings.train.seed)
    model = job.model()
    tasks: list[Task] = []  # stage 0 keeps its own
    own = job.task() if index and settings.rule.forward_unlock else None  # before anyone is waited for: it may fail
    with ExitStack() as stack:
        links = stack.enter_context(_opened(settings, index, place.incarnation))
        agreed = _agreement(job, model, tasks, place, links, watch)
        check_settings(shared_settings(settings), agreed.settings, f"stage {index}", "the run that it belongs to")
        check_model(model, agreed.plan, index)
        x, along = agreed.plan.input(index)
        sizes = demanded(part(model, agreed.plan, index), *x, along) if index else {}
        links.run_id, links.fits = agreed.run_id, expected(agreed.plan, settings.wire, index, sizes)
        stage = build_stage(job, model, agreed.plan, index, agreed.total, StageMetrics(index, agreed.plan.stages))
        clock, stage.metrics.dropped = stage.metrics.clock, links.dropped
        links.packing, links.full = clock.span("serialize"), clock.span("wait_send")
        ledger = Ledger(place.folder / NAME, place.incarnation, _restore(stage, agreed, place))
        stack.callback(ledger.close)
        links.last = stage.last_batch = ledger.last
        first: Heard | None = None
        if not stage.last and (index == 0 or place.first):
            known, first = _wait(links, settings.service.patience, watch)
            stage.last_batch = max(ledger.last, known if index == 0 else 0)  # no id is trained twice, by no stage
        agreed = replace(agreed, start=stage.last_batch, folder=str(run))
        heads = head_of(settings, tasks[0], agreed, stage.metrics, PatientHead) if tasks else None
        head = stack.enter_context(heads) if heads else None

        def over() -> None:
            if head:
                conclude(job, tasks[0], agreed, head)
            place.ended()

        keeping = _keeping(settings, agreed, stage, place, links, ledger, watch)
        kind = partial(_kind(settings, agreed, index, own), **keeping, over=over, first=first)
        worker = stack.enter_context(worker_of(settings, agreed, stage, links, head, kind))
        with watch:
            try:
                with interruptible(worker):
                    worker.run()
            except AskedToEnd:
                saved = "saved" if _save(stage, agreed, place) else "not saved"
                _say(index, f"asked to end: {saved} at batch {stage.last_batch}, ends; the others go on without it")
    return run


def _keeping(
    settings: Config, agreed: Agreement, stage: Stage, place: Place, links: Links, ledger: Ledger, watch: _Watch
) -> dict[str, Any]:
    service = settings.service
    text = replace(agreed, start=0, folder="").to_json().encode()
    return {
        "links": links,
        "ledger": ledger,
        "agreement": Agreed(torch.frombuffer(bytearray(text), dtype=torch.uint8)),
        "total": agreed.total,
        "unguided": service.unguided_batches if settings.rule.name in GUIDES else 0,
        "patience": service.patience,
        "silence": service.silence,
        "hung": service.hung,
        "save_own": partial(_save, stage, agreed, place),
        "save_every": service.save_every,
        "alive": watch.alive,
        "say": partial(_say, stage.index),
    }


def _kind(settings: Config, agreed: Agreement, index: int, task: Task | None) -> Callable[..., Keeper]:
    """The loop; task: what a stage that guesses its inputs may draw them from."""
    if not settings.rule.forward_unlock:
        return Keeper
    if task is None:
        return partial(GuessingKeeper, draws=None)
    drawing = partial(drawn, replace(task, classes=agreed.plan.classes), settings.train.seed, total=agreed.total)
    return partial(GuessingKeeper, draws=Draws(drawing, settings.service.unguided_batches, partial(_say, index)))


class _Watch:
    """Tells that a loop goes round. When it has not for as long as it may, stacks are printed and the process ends: in
    a thread of C's own, so also while the interpreter is held. Ends the stage, too, if another process has its place,
    or the one that started it is gone: nobody would end it.

    `waiting`: how long a loop may stand that only waits. `every`: seconds, at most, for which one may wait. Behind a
    `with`, what is done may take its time.
    """

    def __init__(self, place: Place, hung: float, stage: int) -> None:
        self.place, self.stage, self._next = place, stage, 0.0
        self.waiting = self._limit = Limit(hung, "service.hung")
        self.every = min(1.0, hung / 4)
        self.parent = os.getppid()

    def __enter__(self) -> None:
        self._next = 0.0

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def alive(self, limit: Limit) -> None:
        """The loop goes round, and may stand for so long from now on: a longer limit holds at once."""
        now = time.monotonic()
        if now < self._next and limit.seconds <= self._limit.seconds:
            return
        self._next = now + self.every
        if os.getppid() != self.parent:
            raise PeerLost(f"stage {self.stage} ends: the process that started it is gone")
        self.place.check()
        self.place.touch(limit)
        self._limit = limit
        faulthandler.dump_traceback_later(limit.seconds, exit=True)


def _say(stage: int, line: str) -> None:
    sys.stderr.write(f"stage {stage}: {line}\n")  # in one piece: others write here too


# -- its state ---------------------------------------------------------------------------------------------------


def _save(stage: Stage, agreed: Agreement, place: Place) -> bool:
    """The stage as it is now: a run of one stage, in its own folder. False, and told, if the disk does not take it.

    Raises Replaced: the states there are a newer process's.
    """
    place.check()
    batch = stage.last_batch
    folder = place.folder / "checkpoints" / f"{batch:08d}"
    if not batch or folder.exists():
        return True
    try:
        checkpoint.save_part(place.folder, batch, 0, state_of(stage, agreed.plan))
        checkpoint.complete(place.folder, batch, 1, {}, KEEP)
        return True
    except OSError as error:
        if not (folder / "manifest.json").exists():  # half a state would only keep the disk full
            shutil.rmtree(folder, ignore_errors=True)
        _say(stage.index, error.strerror or str(error))
        return False


def _restore(stage: Stage, agreed: Agreement, place: Place) -> int:
    """Make the stage what it last saved whole; returns that batch id, 0 if there is nothing."""
    try:
        saved = checkpoint.newest(place.folder)
    except CheckpointError as error:
        if (place.folder / "checkpoints").exists():
            _say(stage.index, f"begins with its initial weights: {error}")
        return 0
    ends = boundary_of(stage, agreed.plan), first_of(stage, agreed.plan)
    load_state(stage, saved.state_for(stage.module.state_dict(), *ends))
    for passed in saved.skipped:
        _say(stage.index, f"passed over a state of its own: {passed}")
    return saved.batch


# -- its neighbours ----------------------------------------------------------------------------------------------


@contextmanager
def _opened(settings: Config, index: int, incarnation: int) -> Iterator[Links]:
    transport, addresses = settings.transport, settings.service.addresses
    shared = shared_settings(settings)
    links = Links(index, settings.pipeline.stages, incarnation, shared, **edges_of(settings, index))
    try:
        if index < len(addresses):
            own = own_endpoint(addresses[index], transport.address)
            check_free(own)
            links.listen(own, settings.security.private_network)
        if index > 0:
            links.connect(endpoint(addresses[index - 1]))
        yield links
    finally:
        links.close()


def _agreement(
    job: Job, model: torch.nn.Module, tasks: list[Task], place: Place, links: Links, watch: _Watch
) -> Agreement:
    """What stage 0 has decided for all: kept since an earlier start, made now, or heard from the stage before."""
    if links.stage == 0:
        if not place.agreement:
            agreed = agree(job, model, tasks, False)
            place.joined(agreed.to_json())
            return agreed
        agreed = Agreement.from_json(place.agreement)
        tasks.append(replace(job.task(), classes=agreed.plan.classes))
        return agreed
    if place.agreement:
        return Agreement.from_json(place.agreement)
    with watch:
        for got in _turns(links, Side.PREVIOUS, job.config.service.patience, watch):
            links.events.clear()
            if got and isinstance(got[1], Agreed):
                return _read(got[1], place)
    raise AssertionError("a wait ends with what it is for, or an error")


def _read(agreed: Agreed, place: Place) -> Agreement:
    try:
        text = bytes(agreed.x.tolist()).decode()
        found = Agreement.from_json(text)
    except (ValueError, TypeError, KeyError) as error:
        raise MessageError(f"the agreement of the run is not one: {type(error).__name__}: {error}") from None
    place.joined(text)
    return found


def _wait(links: Links, patience: float, watch: _Watch) -> tuple[int, Heard | None]:
    """Until the next stage is there; the last batch id that it has trained, and what it said right behind its greeting,
    if that came with it: at the end of a run its last report, which it says but once.
    """
    with watch:
        for got in _turns(links, Side.NEXT, patience, watch):
            while links.events:
                event = links.events.popleft()[1]
                if isinstance(event, Up) and links.up(Side.NEXT):
                    return event.link.last, got
    raise AssertionError("a wait ends with what it is for, or an error")


def _turns(links: Links, side: Side, patience: float, watch: _Watch) -> Iterator[Heard | None]:
    """What comes from that neighbour, or None when there is something else to look at. Raises WaitTimeout."""
    other = links.stage + (1 if side is Side.NEXT else -1)
    _say(links.stage, f"waiting for stage {other}")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        watch.alive(watch.waiting)
        yield links.receive([side], watch.every)
    raise WaitTimeout(
        f"stage {links.stage} waited {patience:g} s (service.patience) for stage {other}, which never came: start it"
    )


__all__ = ["serve"]
