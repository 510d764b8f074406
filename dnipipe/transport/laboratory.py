"""Stages that take turns in one process, over a link with an exact delay: no serialization, and bitwise repeatable.

    tick 1   what is due for stage 0; it draws batch 1; then all that is due by now, in the order in which it was sent
    tick 2   what is due for stage 0; it draws batch 2; …          a message is due `delay` ticks after it was sent

Each stage has a thread, as it would have a process, but only the one whose turn it is runs: it gives its turn away when
it has to wait. So the worker's loop is the one that runs over a network, and the clock is the count of the batches that
stage 0 drew: looking for a message in vain (`receive` with timeout 0, which stage 0 does before it draws) ends a tick.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from dnipipe.errors import PeerLost, WaitTimeout
from dnipipe.messages import Message
from dnipipe.transport import AT_EASE, Side
from dnipipe.transport.local import detached

Key = tuple[float, int]  # (tick at which it is due, number in the order of sending)
AT_ONCE, NEVER = (0, -1), (float("inf"), 0)
LOOK_EVERY = 1.0  # seconds, at most, of a wait that are counted at once


@dataclass(eq=False)
class _Wait:
    """A thread without the turn, and what it waits for."""

    thread: int
    when: Callable[[], Key]  # it can go on, as things stand
    looks: bool = False  # it goes on at the end of this tick, whatever comes


class Laboratory:
    """Connected transports that share one clock and one turn.

    Args:
        stages: K. delay: ticks that a message is under way. capacity: messages that a queue holds.
        timeout: seconds that a thread waits for its turn, or for room in a queue, while this process runs.
        threads: how many will `join`. No tick begins before all have, so that every run goes alike.
    """

    def __init__(
        self, stages: int, delay: int = 0, capacity: int = 1 << 16, timeout: float = 120.0, threads: int = 0
    ) -> None:
        self.delay, self.capacity, self.timeout, self.threads = delay, capacity, timeout, threads
        self.now = 0
        self.lock = threading.RLock()
        self.owner: int | None = None  # the thread that has the turn
        self.joined: set[int] = set()  # threads
        self.waits: dict[LaboratoryTransport, _Wait] = {}
        self.numbers = itertools.count()
        self._all_here = threading.Event()
        self.transports = [LaboratoryTransport(self, k) for k in range(stages)]
        for before, after in itertools.pairwise(self.transports):
            before.peers[Side.NEXT], after.peers[Side.PREVIOUS] = after, before

    def enter(self, thread: int) -> None:
        self.joined.add(thread)
        if len(self.joined) == self.threads:
            self._all_here.set()

    def choose(self) -> LaboratoryTransport | None:
        """Whose turn it is; moves the clock on if nobody can go on at this tick. None: nobody ever can, as it stands.

        Called with the turn, so that nothing changes meanwhile but by `wake`.
        """
        if self.threads and not self._all_here.wait(self.timeout):
            raise WaitTimeout(f"{len(self.joined)} of {self.threads} stages came within {self.timeout:g} s")
        with self.lock:
            when = {transport: wait.when() for transport, wait in self.waits.items()}
            first = min(when, key=lambda transport: when[transport], default=None)
            if first is None or when[first][0] > self.now:
                looking = next((transport for transport, wait in self.waits.items() if wait.looks), None)
                if looking:
                    first, self.now = looking, self.now + 1
                elif first is not None and when[first] == NEVER:
                    first = None
                elif first is not None:
                    self.now = int(when[first][0])
            self.owner = self.waits.pop(first).thread if first else None
            return first


class LaboratoryTransport:
    """One stage's end of its edges (see Transport)."""

    def __init__(self, laboratory: Laboratory, index: int) -> None:
        self.laboratory, self.index = laboratory, index
        self.peers: dict[Side, LaboratoryTransport] = {}
        self._inbox: dict[Side, deque[tuple[Key, Message]]] = {side: deque() for side in Side}
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()  # each: look whether it is your turn
        self._woken = self._closed = False
        self._ticked = False  # looking has ended a tick; what is due in the new one comes before None

    def join(self) -> None:
        """This thread is the stage: it keeps its turn from call to call. Returns when it has it."""
        self._take_turn(joining=True)

    # -- messages ----------------------------------------------------------------------------------------------

    def send(self, side: Side, message: Message) -> None:
        """Raises PeerLost if that side is closed, WaitTimeout if its queue stays full."""
        lab, peer = self.laboratory, self.peers[side]
        box = peer._inbox[Side.PREVIOUS if side is Side.NEXT else Side.NEXT]
        with self._on_turn():
            if len(box) >= lab.capacity and not peer._closed:
                self._wait(lambda: AT_ONCE if len(box) < lab.capacity or peer._closed else NEVER, lab.timeout)
            if peer._closed:
                raise PeerLost(f"stage {peer.index}, the {side.value} of stage {self.index}, has closed")
            if len(box) >= lab.capacity:
                raise WaitTimeout(
                    f"stage {self.index} waited {lab.timeout:g} s to send batch {getattr(message, 'batch', None)} to "
                    f"stage {peer.index}, whose queue of {lab.capacity} messages stayed full"
                )
            box.append(((lab.now + lab.delay, next(lab.numbers)), detached(message)))

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        """The next message that is due; with timeout 0, None at the end of this tick, else when none can come."""
        with self._on_turn():
            tick, looks = self.laboratory.now, timeout == 0
            if not self._woken and self._when(sides)[0] > tick and not (looks and self._ticked):
                with waiting:
                    self._wait(lambda: AT_ONCE if self._woken else self._when(sides), timeout, looks)
                self._ticked = looks and self.laboratory.now > tick
            if self._woken:
                self._woken = False
                return None
            for side in sides:
                box = self._inbox[side]
                if box and box[0][0][0] <= self.laboratory.now:
                    return side, box.popleft()[1]
            for side in sides:
                if self._is_gone(side):
                    raise PeerLost(
                        f"stage {self.peers[side].index}, the {side.value} of stage {self.index}, has closed"
                    )
            self._ticked = False
            return None

    def _when(self, sides: Sequence[Side]) -> Key:
        """When the first message of these sides is due; at once, if one of them is closed and has nothing more."""
        heads = [self._inbox[side][0][0] for side in sides if self._inbox[side]]
        return AT_ONCE if any(map(self._is_gone, sides)) else min(heads, default=NEVER)

    def _is_gone(self, side: Side) -> bool:
        return not self._inbox[side] and side in self.peers and self.peers[side]._closed

    # -- turns -------------------------------------------------------------------------------------------------

    @contextmanager
    def _on_turn(self) -> Iterator[None]:
        """What is done in here is done alone. Who has not joined gives the turn back behind it."""
        self._take_turn()
        try:
            yield
        finally:
            if threading.get_ident() not in self.laboratory.joined:
                self._pass_on()

    def _take_turn(self, joining: bool = False) -> None:
        lab, me = self.laboratory, threading.get_ident()
        with lab.lock:
            mine = lab.owner in (None, me)
            if mine:
                lab.owner = me
            else:
                lab.waits[self] = _Wait(me, lambda: AT_ONCE)
            if joining:
                lab.enter(me)
        if mine:
            return
        if not self._stand_by(me, lab.timeout):
            raise WaitTimeout(f"stage {self.index} waited {lab.timeout:g} s for its turn")

    def _wait(self, when: Callable[[], Key], timeout: float, looks: bool = False) -> None:
        """Give the turn away until `when`; or for at most `timeout` seconds in which nobody can go on."""
        me = threading.get_ident()
        with self.laboratory.lock:
            self.laboratory.waits[self] = _Wait(me, when, looks)
        if self._pass_on() is not self:
            self._stand_by(me, timeout)

    def _pass_on(self) -> LaboratoryTransport | None:
        chosen = self.laboratory.choose()
        if chosen is not None and chosen is not self:
            chosen._calls.put(None)
        return chosen

    def _stand_by(self, me: int, timeout: float) -> bool:
        """Sleep until this thread has the turn: given (True), or taken after `timeout` seconds without any (False)."""
        lab = self.laboratory
        while True:
            running = lab.owner is not None
            expired = not self._called(lab.timeout if running else timeout)
            with lab.lock:
                if self not in lab.waits:
                    return True
                if lab.owner is None and (expired or self._woken):
                    del lab.waits[self]
                    lab.owner = me
                    return not expired
            if expired and running:
                raise WaitTimeout(f"stage {self.index} waited {lab.timeout:g} s for its turn")

    def _called(self, seconds: float) -> bool:
        """Whether a call comes in so many seconds in which this process runs: one that is stopped (Ctrl-Z) and goes on
        an hour later has not waited for a stage that hangs."""
        while True:
            try:
                self._calls.get(timeout=min(seconds, LOOK_EVERY))
                return True
            except queue.Empty:
                seconds -= LOOK_EVERY
                if seconds <= 0:
                    return False

    # -- waking and ending -------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Make a `receive` that waits, or the next one, return None at once."""
        self._woken = True
        self._calls.put(None)

    def close(self) -> None:
        """What was sent stays with the neighbours; what came and was not received is gone. The turn goes on."""
        if self._closed:
            return
        self._take_turn()
        self.laboratory.joined.discard(threading.get_ident())
        self._closed = True
        for box in self._inbox.values():
            box.clear()
        self._pass_on()


__all__ = ["Laboratory", "LaboratoryTransport"]
