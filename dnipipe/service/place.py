"""Where an independent stage lives: its folder, its neighbours' addresses.

RUN/stage-K/start.json      which start this is, what it is part of (the agreement), whether the run is over
            checkpoints/    its own state, in the form of a run of one stage
            ledger.jsonl    ledger.py
            alive           touched when its loop comes round; in it: for how long that may stand, and why so long
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnipipe import socket_file
from dnipipe.config import Config
from dnipipe.errors import CheckpointError, ConfigError, Replaced, RunError
from dnipipe.service.limits import Limit, shown

START = "start.json"
ALIVE = "alive"


@dataclass(frozen=True)
class Place:
    """One stage's folder.

    Args:
        folder: RUN/stage-K. incarnation: which start of the stage this is: one more than the one before. agreement:
        JSON, once it is known. over: the run has ended, and every stage may go. first: nobody was started here before.
    """

    folder: Path
    incarnation: int
    agreement: str
    over: bool
    first: bool

    @classmethod
    def taken(cls, run: Path, stage: int) -> Place:
        """The folder, and one more start noted in it. Raises CheckpointError if the note is damaged."""
        folder = run / f"stage-{stage}"
        folder.mkdir(parents=True, exist_ok=True)
        first = not (folder / START).exists()
        # a folder may have been removed: its neighbours refuse who has a lower number than they have heard
        new: dict[str, Any] = {"incarnation": int(time.time()), "agreement": "", "over": False}
        before = new if first else cls._read(folder)
        note = {**before, "incarnation": before["incarnation"] + 1}
        cls._write(folder, note)
        return cls(folder, first=first, **note)

    def joined(self, agreement: str) -> None:
        """Note what the stage is part of."""
        self._write(self.folder, {**self._read(self.folder), "agreement": agreement})

    def ended(self) -> None:
        """Note that the run has: who is started once more finds nobody, and need not wait."""
        self._write(self.folder, {**self._read(self.folder), "over": True})

    def check(self) -> None:
        """Raises Replaced if the stage was started again since: its folder is the newer process's."""
        newest = int(self._read(self.folder)["incarnation"])
        if newest != self.incarnation:
            stage = self.folder.name.replace("-", " ")
            raise Replaced(f"{stage}, incarnation {self.incarnation}, ends: {newest} has taken its place")

    def touch(self, limit: Limit) -> None:
        """Note that the loop goes round, and how long it may stand from now on."""
        path, text = self.folder / ALIVE, f"{limit.seconds} {limit.source}"
        path.touch()
        if path.read_text() != text:
            with contextlib.suppress(OSError):  # a full disk: who looks takes the setting
                path.write_text(text)

    @staticmethod
    def _write(folder: Path, note: dict[str, Any]) -> None:
        path = folder / START
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({**note, "crc32": _checksum(note)}))
            os.replace(temporary, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error

    @staticmethod
    def _read(folder: Path) -> dict[str, Any]:
        try:
            note: dict[str, Any] = json.loads((folder / START).read_text())
            if note.pop("crc32") != _checksum(note):
                raise ValueError("its checksum does not fit")
            return note
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            cure = f"to begin the stage anew, remove {folder}"
            if folder.name == "stage-0":  # it would make another run, and the other stages would refuse it
                cure = "only stage 0 has decided what the run is: begin another, and name its output.run at every stage"
            raise CheckpointError(f"{folder / START} is damaged ({error}): {cure}") from None


def agreement_of(start: Path) -> str:
    """What the stage of this start.json is part of; "" if it has not heard it. Raises CheckpointError if damaged."""
    return str(Place._read(start.parent)["agreement"])


def _checksum(note: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(note, sort_keys=True).encode())


def unhealthy(run: Path, stage: int, hung: float) -> str:
    """Why the stage does not count as healthy; "" if it does: its loop has come round within the limit that it noted.

    In one turn the loop takes a message and does all that this asks of it, or waits for one, a second at most. So who
    has something to do and does not get on with it is not healthy, and who only waits for a neighbour is.
    hung: that limit, if there is no note of it.
    """
    path = run / f"stage-{stage}" / ALIVE
    return stood(run, stage, hung) if path.exists() else f"stage {stage} has not begun: {path} is not there"


def stood(run: Path, stage: int, hung: float, most: float = math.inf) -> str:
    """That the stage's loop has stood for longer than it may; "" if it has not, or for longer than `most` seconds."""
    path, limit = run / f"stage-{stage}" / ALIVE, Limit(hung, "service.hung")
    try:
        silent = time.time() - path.stat().st_mtime
        seconds, _, source = path.read_text().partition(" ")
        limit = Limit(float(seconds), source)
    except FileNotFoundError:
        return ""
    except ValueError:  # no note, for the disk was full
        pass
    over = limit.seconds <= silent <= most
    return f"stage {stage} has not moved for {shown(silent)} s, its limit is {limit}" if over else ""


def check(config: Config, index: int) -> None:
    """Raises ConfigError for a configuration that independent stages cannot run."""
    stages, addresses = config.pipeline.stages, config.service.addresses
    if not 0 <= index < stages:
        raise ConfigError(f"--index {index} with pipeline.stages = {stages}: give one of 0 to {stages - 1}")
    if len(addresses) != stages - 1 or len(set(addresses)) != len(addresses):
        raise ConfigError(
            f"service.addresses = {list(addresses)} with pipeline.stages = {stages}: give {stages - 1} different "
            "HOST:PORT, one for each stage but the last, where it listens for the stage behind it"
        )
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not address.startswith("/") and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigError(f"service.addresses: {address!r} is neither HOST:PORT nor the path of a socket file")
    if config.transport.kind != "zmq":
        raise ConfigError(f"transport.kind = {config.transport.kind}: independent stages need transport.kind = zmq")
    if config.rule.name == "sync":
        raise ConfigError("rule.name = sync: it needs every stage at every batch; start the run with dnipipe train")


def endpoint(address: str) -> str:
    """HOST:PORT, or the path of a socket file, as zmq connects to it."""
    return f"ipc://{address}" if address.startswith("/") else f"tcp://{address}"


def own_endpoint(address: str, chosen: str) -> str:
    """The same, to listen on: the one address that this machine has under that name, or the chosen one.

    Raises ConfigError if there is none, RunError if nobody answers who would know, as while a machine starts: then its
    supervisor tries again.
    """
    if address.startswith("/"):
        return f"ipc://{address}"
    host, _, port = address.rpartition(":")
    if chosen:
        return f"tcp://{chosen}:{port}"
    try:
        found = socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        later = error.errno == socket.EAI_AGAIN
        raise (RunError if later else ConfigError)(
            f"service.addresses: {host} has no address here{' yet' * later} ({error.strerror}): set transport.address "
            "to the one to listen on"
        ) from None
    return f"tcp://{found}:{port}"


def check_free(endpoint: str) -> None:
    """Raises RunError if somebody listens there already; an older process of this stage does until it has ended.

    What a killed process has left of a socket file is taken away; ConfigError if it is no socket.
    """
    scheme, _, where = endpoint.partition("://")
    if not (socket_file.free(Path(where)) if scheme == "ipc" else _port_is_free(where)):
        raise RunError(
            f"{endpoint} is taken: an older process of this stage ends in a moment; if it is another program, mend "
            "service.addresses"
        )


def _port_is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as zmq binds
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            return error.errno != errno.EADDRINUSE  # of any other, zmq will say what it is
    return True


__all__ = [
    "ALIVE",
    "START",
    "Place",
    "agreement_of",
    "check",
    "check_free",
    "endpoint",
    "own_endpoint",
    "stood",
    "unhealthy",
]
