"""A hostile neighbour, or a stranger, at one link of a running pipeline: between stage k and the one behind it.

stage k ◄── stranger ── 127.0.0.1        stage k ◄── Recorder: flips a bit, says again ◄── stage k+1, by 127.0.0.2
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import zmq

from benchmarks.faults import strangers
from benchmarks.faults.events import Event
from benchmarks.faults.pipeline import Pipeline
from benchmarks.fuzz.connections import GREETING
from benchmarks.fuzz.mutants import Mutants
from benchmarks.relay import LOOPBACK, RECENT, play
from dnipipe.config import load, shared_settings
from dnipipe.errors import PeerError
from dnipipe.keys import KeyRing
from dnipipe.messages import Gradient
from dnipipe.service.links import Links
from dnipipe.service.place import START
from dnipipe.transport import Side

SPAN = 2**17  # bytes within which a bit is flipped: some of an activation, of what stands around it, of a sign of life
STRANGE = 10**9  # the batch that an impostor speaks of
STAYS = 1.0  # seconds that a connection stays when all was said again
SPEAKS = 3.0  # seconds that one tries to get in
HOLDS = 5.0  # seconds for which connections are held, or kept coming
FILES, SILENT = 128, 400
TOO_LARGE, TOO_MANY = 2 * 2**20, 300_000  # bytes of a frame, where the limit is 2**20; frames of a message


def flip(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """One bit of what passes, in one direction."""
    link, forth, begin = _link(pipeline, stage), rng.random() < 0.5, time.time()
    cable = pipeline.cables[link]
    cable.flip(rng.randrange(SPAN), rng.randrange(8), forth)
    pipeline.until("a bit is flipped", lambda: cable.flipped(forth))
    return Event(link, begin, time.time())


def replay(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """What passed is said again: on its own connection, or from its first byte on over another one."""
    link, forth, begin = _link(pipeline, stage), rng.random() < 0.5, time.time()
    cable = pipeline.cables[link]
    if rng.random() < 0.5:
        cable.say_again(rng.randrange(1, RECENT), forth)
        pipeline.until("it is said again", lambda: cable.said_again(forth))
    else:
        play(pipeline.endpoint(link), cable.begun[True], STAYS)
    return Event(link, begin, time.time())


def wrong_key(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """Somebody speaks as the next stage, with no key or one that is not its own; else he knows all there is to know."""
    link, kind = _link(pipeline, stage), rng.choice(list(strangers.KINDS.values()))
    assert pipeline.keys
    with tempfile.TemporaryDirectory() as aside:
        ring = kind(pipeline.keys, link + 1, Path(aside) / "keys")
        return _impostor(pipeline, link, ring, int(time.time()) + 10**6)


def stale(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """An earlier process of the next stage, with its key: it has not heard that it was replaced."""
    link = _link(pipeline, stage)
    return _impostor(pipeline, link, KeyRing(pipeline.keys, link + 1) if pipeline.keys else None, 1)


def _impostor(pipeline: Pipeline, link: int, ring: KeyRing | None, incarnation: int) -> Event:
    begin, config = time.time(), load(pipeline.config)
    links = Links(
        link + 1,
        pipeline.stages,
        incarnation,
        shared_settings(config),
        queue=64,
        timeout=SPEAKS,
        max_message=2**20,
        ring=ring,
    )
    links.run_id = json.loads(json.loads((pipeline.run / f"stage-{link}" / START).read_text())["agreement"])["run_id"]
    with contextlib.closing(links), contextlib.suppress(PeerError):  # it is told to end
        links.connect(pipeline.endpoint(link))
        if link + 2 < pipeline.stages:  # as that stage does
            links.listen(f"tcp://{LOOPBACK}:*")
        while time.time() < begin + SPEAKS:
            links.receive([Side.PREVIOUS], 0.1)
            links.events.clear()
            links.send(Side.PREVIOUS, Gradient(STRANGE, torch.zeros(1)))
    return Event(link, begin, time.time())


def oversize(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """A frame above the limit."""
    return _says(pipeline, stage, lambda peer: _send(peer, [bytes(TOO_LARGE)]))


def many_frames(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """A message of 300,000 frames."""
    return _says(pipeline, stage, lambda peer: _send(peer, [b"x"] * TOO_MANY))


def flood(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """For 5 s as many messages as it takes, that are almost messages (benchmarks/fuzz)."""
    mutants = Mutants(rng.randrange(2**32))

    def floods(peer: zmq.Socket[bytes]) -> None:
        end = time.monotonic() + HOLDS
        while time.monotonic() < end:
            _send(peer, mutants.next(0))

    return _says(pipeline, stage, floods)


def _says(pipeline: Pipeline, stage: int, what: Callable[[zmq.Socket[bytes]], None]) -> Event:
    """Somebody connects as the next stage, says that, and goes."""
    link, begin = _link(pipeline, stage), time.time()
    with strangers.bare(pipeline.endpoint(link)) as peer:
        what(peer)
        time.sleep(1)  # until it is taken
    return Event(link, begin, time.time())


def _send(peer: zmq.Socket[bytes], frames: list[bytes]) -> None:
    if peer.poll(1000, zmq.POLLOUT):  # he is being cut off, now and then
        peer.send_multipart(strangers.sealed(frames))


def half_open(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """100 connections whose other end is no more, in the middle of their greeting, and has not said so."""
    link, begin = _link(pipeline, stage), time.time()
    host, _, port = pipeline.endpoint(link).removeprefix("tcp://").rpartition(":")
    for _ in range(100):
        with contextlib.suppress(TimeoutError), socket.create_connection((host, int(port)), 1.0) as one:
            one.sendall(GREETING[: rng.randrange(1, len(GREETING))])
            one.setsockopt(socket.IPPROTO_TCP, strangers.REPAIR, 1)
    return Event(link, begin, time.time())


def no_repair() -> str:
    return "" if os.geteuid() == 0 else "root is needed to end a connection without a word"


def idle(pipeline: Pipeline, stage: int, rng: random.Random) -> Event:
    """400 connections that say nothing, and again 400 when they are closed, to a stage that may open 128 files: its
    neighbour must connect anew meanwhile, and all go on."""
    link = _link(pipeline, stage)
    endpoint, held = pipeline.endpoint(link), list[socket.socket]()
    pipeline.until("the stage has a process", lambda: pipeline.pid(link) is not None)

    def beside_them() -> bool:
        closed = [one for one in held if not strangers.still_open(one)]
        for one in closed:
            held.remove(one)
            one.close()
        held.extend(strangers.silent(endpoint, SILENT - len(held)))
        return time.time() > event.begin + HOLDS and all(pipeline.begun(k) > last for k in range(pipeline.stages))

    with _few_files(pipeline.pid(link)):
        event, last = Event(link, time.time(), time.time()), pipeline.last()
        beside_them()
        pipeline.cables[link].cut()
        try:
            pipeline.until("all go on beside them", beside_them)
        finally:
            for one in held:
                one.close()
    return event


@contextlib.contextmanager
def _few_files(pid: int | None) -> Iterator[None]:
    assert pid  # 0 would be this process
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (FILES, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may be another one by now
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def _link(pipeline: Pipeline, stage: int) -> int:
    """Behind that stage, or behind the one before if it is the last."""
    return min(stage, pipeline.stages - 2)
