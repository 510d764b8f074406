"""What every stage sent, what it was given and what it did not let in: was anything delivered that nobody had sent?

stage k: Links.send ─► its checksum in witness-k … the network … Links.receive at stage k+1 ─► in witness-(k+1)
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

AWAY = "which is away"  # ends the reason for which a stage itself has not sent something


def attend(path: Path) -> None:
    """In a stage's own process, before it begins: from now on a line in `path` for all that passes its links."""
    from dnipipe import codec
    from dnipipe.messages import Message
    from dnipipe.service.links import Links
    from dnipipe.transport import Side

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    send, receive, counted = Links.send, Links.receive, Counter[str]()

    def note(**line: object) -> None:
        os.write(file, json.dumps(line).encode() + b"\n")

    def passes(what: str, side: Side, message: Message) -> None:
        *_, read = codec.decode(codec.encode(message, "", 0))  # who writes 1 reads 1.0
        note(**{what: side.value, "sum": codec.checksum(codec.encode(read, "", 0)).hex()})

    def count(links: Links) -> None:
        if links.dropped.total() != counted.total():
            for reason, number in (Counter(links.dropped) - counted).items():
                note(dropped=reason, number=number, time=time.time())
                counted[reason] += number

    def sending(links: Links, side: Side, message: Message) -> None:
        passes("sent", side, message)
        send(links, side, message)
        count(links)

    def receiving(links: Links, *arguments: object) -> tuple[Side, Message] | None:
        got = receive(links, *arguments)  # type: ignore[arg-type]
        if got:
            passes("got", *got)
        count(links)
        return got

    Links.send, Links.receive = sending, receiving  # type: ignore[method-assign, assignment]


@dataclass
class Testimony:
    """What a stage's processes have noted."""

    sent: dict[str, Counter[str]] = field(default_factory=lambda: {"next": Counter(), "previous": Counter()})
    got: dict[str, Counter[str]] = field(default_factory=lambda: {"next": Counter(), "previous": Counter()})
    kept_out: list[tuple[float, str, int]] = field(default_factory=list)  # when, why, how many


def read(path: Path) -> Testimony:
    found = Testimony()
    for text in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        line = json.loads(text)
        if "sent" in line:
            found.sent[line["sent"]][line["sum"]] += 1
        elif "got" in line:
            found.got[line["got"]][line["sum"]] += 1
        elif not line["dropped"].endswith(AWAY):
            found.kept_out.append((line["time"], line["dropped"], line["number"]))
    return found


def strange(stages: list[Testimony]) -> int:
    """Messages that were delivered, and that the neighbour had not sent, or not so often."""
    count = 0
    for before, after in itertools.pairwise(stages):
        count += (after.got["previous"] - before.sent["next"]).total()
        count += (before.got["next"] - after.sent["previous"]).total()
    return count


def reasons(stages: Iterable[Testimony]) -> dict[str, int]:
    """How many were not let in, anywhere, by reason."""
    found = Counter[str]()
    for stage in stages:
        for _, reason, number in stage.kept_out:
            found[reason] += number
    return dict(found.most_common())


__all__ = ["Testimony", "attend", "read", "reasons", "strange"]
