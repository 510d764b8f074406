"""Edges that outlast a neighbour: it may die, be cut off, come back, or be another process than before.

    connected ──► Link(nonce a, seen "") ─►       each side makes a nonce for the connection and says it; it
              ◄── Link(nonce b, seen a)  ──       answers the other's, and is up once the other has heard of its own
              ──► Link(nonce a, seen b)  ─►
    up            every message carries both nonces, in the place of a run's token, and is numbered from 0; a Link every
                  half second says how many there were, so that a loss is seen though nothing follows, and that the loop
                  goes round
    gone          the connection ended, a message is missing, bytes are none, or the owner says that nothing moves

So a message of an older connection, or of a process that was replaced, is never taken for a new one's: it is dropped
and counted. libzmq connects again by itself, and asks for the name's address each time. What is sent to a neighbour
that is gone is dropped and counted too: what that means for a batch is the owner's business (keeper.py).
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Union

from dnipipe import codec
from dnipipe.codec import Header
from dnipipe.errors import HandshakeError, PeerLost, Replaced, WaitTimeout
from dnipipe.greeting import check_settings
from dnipipe.messages import PROTOCOL, Link, Message
from dnipipe.service.limits import RECENT
from dnipipe.transport import AT_EASE, Side
from dnipipe.transport.edge import Edge
from dnipipe.transport.zmq import ZmqTransport

GRACE = 0.05  # seconds, over tcp too: a new connection is a new bond in any case, so there is nothing to wait for
AGAIN = 0.5  # seconds between two Links to a neighbour that is connected
GREETING = "link"  # the token of a Link; every other message carries its connection's


@dataclass(frozen=True)
class Up:
    """The neighbour is there; what it said."""

    link: Link


@dataclass(frozen=True)
class Gone:
    """The neighbour is away; why."""

    why: str


Event = Union[Up, Gone]


@dataclass
class _Bond:
    """What is known of one neighbour."""

    stage: int  # who it must be
    nonce: str = ""  # ours, of the connection
    theirs: Link | None = None  # what it said on this connection
    up: bool = False
    handshakes: int = 0  # of the edge, that were answered with a Link
    older: int = 0  # messages in a row that were of no connection that stands
    introduced: float = 0.0  # when the last Link was sent
    incarnation: int = 0  # the highest that was heard
    heard: float = 0.0  # when it last said anything; 0: nothing but Links yet, on this connection
    silent_since: float = 0.0  # when it last said anything, if it was given up and its connection stands
    silences: deque[float] = field(default_factory=partial(deque, maxlen=RECENT))  # seconds before each thing it said

    def spoke(self) -> None:
        now = time.monotonic()
        self.silences.append(now - (self.heard or now))
        self.heard = now


class Links(ZmqTransport):
    """One independent stage's end of its edges: a Transport whose neighbours come and go.

    Args:
        stage, stages: k and K. incarnation: which start of this stage it is.
        settings: that all stages must have in common.
        options: of ZmqTransport.

    What happens to a neighbour is put into `events`; `receive` returns None when something is there.
    """

    def __init__(
        self,
        stage: int,
        stages: int,
        incarnation: int,
        settings: tuple[str, ...],
        **options: Any,
    ) -> None:
        neighbours = {Side.PREVIOUS: stage - 1, Side.NEXT: stage + 1}
        names = {side: f"stage {k}" for side, k in neighbours.items()}
        super().__init__("", names=names, **options)
        self.stage, self.stages, self.incarnation, self.settings = stage, stages, incarnation, settings
        self.run_id = ""  # once the agreement is known
        self.last = 0  # the last batch id that this stage trained, kept by its owner
        self.events: deque[tuple[Side, Event]] = deque()
        self._bonds = {side: _Bond(k) for side, k in neighbours.items() if 0 <= k < stages}

    def _open(self, side: Side, address: str) -> Edge:
        edge = super()._open(side, address)
        edge.grace = GRACE
        return edge

    # -- neighbours --------------------------------------------------------------------------------------------

    def up(self, side: Side) -> bool:
        return side in self._bonds and self._bonds[side].up

    def last_of(self, side: Side) -> int:
        """The last batch id that the neighbour, which is up, had trained when the connection was made."""
        link = self._bonds[side].theirs
        return link.last if link else 0

    def quiet(self, side: Side) -> float:
        """Seconds since the neighbour last said anything, or this found more of a message that is on its way; 0 while
        it has only greeted: it may still be building.
        """
        bond = self._bonds[side]
        if bond.heard and self._edges[side].hears(bond.heard, self.timeout):
            bond.spoke()
        return time.monotonic() - bond.heard if bond.heard else 0.0

    def longest(self, side: Side) -> float:
        """The longest of its recent silences, seconds, that were followed by a word."""
        return max(self._bonds[side].silences, default=0.0)

    def stood(self, seconds: float) -> None:
        """This process itself has not listened for so long: that is nobody else's silence."""
        now = time.monotonic()
        for bond in self._bonds.values():
            bond.heard = min(now, bond.heard + seconds) if bond.heard else 0.0

    def give_up(self, side: Side, why: str) -> None:
        """The owner's verdict on a neighbour that is connected: away, until it answers a new Link.

        If it does over the same connection it was only slow, and how long counts as any silence: so a busy stage is not
        given up again and again.
        """
        bond = self._bonds[side]
        heard = bond.heard
        self._lose(side, why)
        bond.silent_since = heard
        self._introduce(side, anew=True)

    def _lose(self, side: Side, why: str) -> None:
        bond, edge = self._bonds[side], self._edges[side]
        if bond.up:
            self.events.append((side, Gone(why)))
        bond.up, bond.theirs, bond.silent_since, edge.token = False, None, 0.0, ""
        if edge.backlog:
            self.dropped[f"Message that waited for room to {edge.name}, which is away"] += len(edge.backlog)
            edge.backlog.clear()

    def _introduce(self, side: Side, anew: bool) -> None:
        bond = self._bonds[side]
        if anew:
            bond.nonce = secrets.token_hex(8)
        self._say(side, bond.theirs.nonce if bond.theirs else "")

    def _say(self, side: Side, seen: str, refused: str = "") -> None:
        bond = self._bonds[side]
        bond.introduced = time.monotonic()
        me = self.stage, self.stages, self.incarnation, self.run_id, self.settings, self.last
        edge = self._edges[side]
        link = Link(*me, bond.nonce, seen, refused, edge.sent if bond.up else 0)
        for _ in range(max(1, edge.connections)):  # an older process of the neighbour may have one still: to each
            edge.put(edge.seal(codec.encode(link, GREETING, 0)))  # no room: again later

    def _heard_link(self, side: Side, link: Link) -> None:
        """Raises HandshakeError if they do not belong together, Replaced if it knows a newer process of this stage."""
        bond, edge = self._bonds[side], self._edges[side]
        try:
            self._check_link(bond.stage, link)
        except HandshakeError as error:
            if not bond.incarnation:  # nobody who fits was ever there: it may be this stage that is wrong
                raise
            self.dropped.note("a stage that does not belong here", str(error))  # and hears so, by our Link
            return
        if link.refused and link.seen == bond.nonce:
            raise Replaced(f"stage {self.stage}, incarnation {self.incarnation}, ends: {link.refused}{self._doubt()}")
        if link.incarnation < bond.incarnation:
            self.dropped["a stage that was replaced"] += 1
            self._say(side, link.nonce, f"incarnation {bond.incarnation} of stage {link.stage} has taken its place")
            return
        newer, bond.incarnation = 0 < bond.incarnation < link.incarnation, link.incarnation
        if newer and edge.connections > 1:  # the older one has not ended, so half of what is sent would go to it
            self._cut(edge, f"stage {bond.stage} was started again, and its older process still has its connection")
            return
        new = bond.theirs is None or bond.theirs.nonce != link.nonce
        if new and bond.up:
            self._lose(side, f"stage {bond.stage} connected anew")
            bond.nonce = secrets.token_hex(8)
        if bond.up:
            if bond.heard:
                bond.spoke()
            if link.seen == bond.nonce and (lost := link.sent - edge.received - len(edge.kept)) > 0:
                self.give_up(side, f"{lost} messages of {edge.name} were lost on the way{edge.dropped_so_far()}")
            return
        bond.theirs = link
        if new:
            self._introduce(side, anew=not bond.nonce)
        if link.seen == bond.nonce:
            both = (link.nonce, bond.nonce) if side is Side.PREVIOUS else (bond.nonce, link.nonce)
            edge.token, edge.sent, edge.received, edge.torn = "".join(both), 0, 0, False
            if bond.silent_since:
                bond.silences.append(time.monotonic() - bond.silent_since)
            bond.up, bond.heard = True, 0.0
            self.events.append((side, Up(link)))

    def _doubt(self) -> str:
        """A folder that is made anew begins at the time of day (place.py), so that its number is the higher one."""
        if self.last:
            return ""
        return "; if there is no such process, the clock here was set back since: set it, and remove the stage's folder"

    def _check_link(self, expected: int, link: Link) -> None:
        mine = {"protocol": PROTOCOL, "stages": self.stages, "stage": expected, "run": self.run_id or link.run}
        for name, here in mine.items():
            there = getattr(link, name)
            if here != there and not (name == "run" and not there):
                raise HandshakeError(
                    f"stage {self.stage} refuses who connects as stage {expected}: {name} is {there!r} there, {here!r} "
                    "expected here; service.addresses leads to another run, or output.run holds an older one"
                )
        check_settings(self.settings, link.settings, f"stage {self.stage}", f"stage {expected}")

    # -- Transport ---------------------------------------------------------------------------------------------

    def send(self, side: Side, message: Message) -> None:
        """To a neighbour that is away nothing is sent: it is dropped and counted. Raises MessageError if too large."""
        edge = self._edges[side]
        edge.watch_now_and_then()
        self._look(side)
        if not self.up(side):
            self.dropped[f"{type(message).__name__} to {edge.name}, which is away"] += 1
            return
        try:
            self._submit(edge, message)
        except (PeerLost, WaitTimeout) as error:
            self.dropped[f"{type(message).__name__} to {edge.name}, which is away"] += 1
            edge.lost, edge.deadline = "", None
            self.give_up(side, str(error))

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        got = super().receive(sides, timeout, waiting)
        for side, bond in self._bonds.items():
            if bond.heard and side not in sides:  # nobody listened, as while the window is full: that is no silence
                bond.heard = time.monotonic()
        return got

    def _poll(self, poller: Any, edges: Iterable[Edge], seconds: float) -> dict[Any, int]:
        """No longer than until the next Link is due."""
        connected = [bond for side, bond in self._bonds.items() if bond.up and self._edges[side].connected]
        due = min((bond.introduced + AGAIN for bond in connected), default=math.inf) - time.monotonic()
        return super()._poll(poller, edges, min(seconds, due))

    def _sound(self, edges: Sequence[Edge]) -> bool:
        for side in self._bonds:
            self._look(side)
        return not self.events

    def _look(self, side: Side) -> None:
        """What the monitor has told: a connection's end, or a new one, which is greeted; and a revoked key."""
        bond, edge = self._bonds[side], self._edges[side]
        self._check_key(edge)
        if edge.handshakes > bond.handshakes:
            bond.handshakes = edge.handshakes
            self._lose(side, f"the connection to {edge.name} was made anew")
            self._introduce(side, anew=True)
        elif gone := edge.gone:
            edge.deadline = None
            self._lose(side, gone)
        elif time.monotonic() > bond.introduced + AGAIN:
            if edge.connected:
                self._introduce(side, anew=False)
            elif side is Side.PREVIOUS and not bond.up and (edge.refused or edge.idle):
                bond.introduced = time.monotonic()
                if edge.refused:
                    self.dropped.note("not let in there", edge.refused)
                edge.dial()

    def _is_next(self, edge: Edge, header: Header) -> bool:
        """Whether this is the next message of this connection; a Link is answered. Raises MessageError."""
        side, bond = edge.side, self._bonds[edge.side]
        if header.run == GREETING and header.type == Link.__name__:
            edge.watch()  # the connection that it came by must be known first
            self._look(side)
            self._heard_link(side, self._link(header))
            return False
        if not edge.token or header.run != edge.token:
            self.dropped["an older connection's message"] += 1
            bond.older += 1
            if bond.older > 2 * self.queue:  # more than can have been on the way
                bond.older = 0
                self._cut(edge, f"{edge.name} keeps sending what belongs to no connection")
            return False
        bond.older = 0
        if edge.ahead(header.seq):
            self.give_up(side, f"messages of {edge.name} were lost on the way{edge.dropped_so_far()}")
            return False
        bond.spoke()
        return True

    def _away(self, edge: Edge, why: str) -> None:
        self._lose(edge.side, why)

    def _link(self, header: Header) -> Link:
        link = codec.read_body(header, [], 0)
        assert isinstance(link, Link)
        return link


__all__ = ["Event", "Gone", "Links", "Up"]
