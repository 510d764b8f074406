"""How the processes of a run find one another: through the c10d store that torchrun, or our own launcher, provides.

    stage 0     makes the agreement (run id, folder, settings, plan) ──► store ──► every other stage
    stage k     binds a free port or a socket file, publishes it     ──► store ──► stage k+1 connects

    start N     all processes anew, by torchrun, after a death: with keys of its own in the same store

No port is configured by hand. Every wait has a limit, and a stage that fails tells those who wait for it.
"""

from __future__ import annotations

import copy
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dnipipe.errors import ConfigError, PeerStopped, WaitTimeout, told
from dnipipe.loopback import LOOPBACK

AGAIN = 0.5  # seconds until stage 0 looks anew who knocks


class Rendezvous:
    """This process's place among the K, and the store they share. Raises ConfigError if started in another way."""

    def __init__(self, timeout: float) -> None:
        try:
            self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self.machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
            self.master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise ConfigError(f"not started by torchrun or dnipipe train: {error} is missing or wrong") from None
        self.incarnation = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.timeout, self.number = timeout, 1
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.serves = self.rank == 0 and not agents  # the store lives in this process, and ends with it
        try:
            store = TCPStore(
                self.master,
                port,
                is_master=self.serves,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except DistError as error:
            raise WaitTimeout(f"rank {self.rank} waited {timeout:g} s for the store of the launcher: {error}") from None
        self._all = PrefixStore("dnipipe", store)
        if agents and self.machines > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            self.incarnation = self._counted()
        self.store: Store = self._of(self.incarnation)

    def another(self, timeout: float) -> Rendezvous:
        """The next one of the same processes: it hears nothing that was said in this one."""
        made = copy.copy(self)
        made.timeout, made.number = timeout, self.number + 1
        made.store = made._of(made.incarnation)
        return made

    def _of(self, start: int) -> Store:
        """The keys of one start of all the processes, of which torchrun may make several."""
        return PrefixStore(f"{start}/{self.number}", self._all)

    def _counted(self) -> int:
        """Which start of all this is. The agents of several machines do not count alike: one counts the deaths of its
        own processes, and not that it starts them again because another's have died. So stage 0 counts for all.

        A number that lies there may be of an earlier start. So a stage knocks, in words of its own, and waits for the
        answer to these.
        """
        self.store = self._all
        if self.rank == 0:
            start = int(self._all.add("starts", 1)) - 1
            for rank in range(1, self.world):
                self._admit(rank, start)
            return start
        word = secrets.token_hex(8)
        self.publish(f"knock/{self.rank}", word)
        start = int(self.get(f"start/{word}", "stage 0"))
        self._of(start).set(f"here/{self.rank}", "")
        return start

    def _admit(self, rank: int, start: int) -> None:
        """Tell that stage, once it knocks. Whoever has knocked may be dead, and another come in its place."""
        for _ in range(max(1, int(self.timeout / AGAIN))):
            self.publish(f"start/{self.get(f'knock/{rank}', f'stage {rank}')}", str(start))
            with suppress(DistError):
                self._of(start).wait([f"here/{rank}"], timedelta(seconds=AGAIN))
                return
        raise WaitTimeout(f"stage 0 waited {self.timeout:g} s for stage {rank} to come (transport.timeout)")

    def agree(self, make: Callable[[], str]) -> str:
        """What stage 0 makes, for all. If making it fails there, the others raise PeerStopped at once."""
        if self.rank == 0:
            with self._telling("agreement"):
                text = make()
            self.publish("agreement", f"made {text}")
            return text
        return self.made("agreement", 0)

    def earlier(self, key: str) -> str | None:
        """TEXT, if an earlier start of all published `made TEXT` under the key, and an agent has kept the store."""
        for start in range(self.incarnation - 1, -1, -1):
            store = self._of(start)
            word, _, text = store.get(key).decode().partition(" ") if store.check([key]) else ("",) * 3
            if word == "made":
                return text
        return None

    @contextmanager
    def together(self, what: str, *promised: str) -> Iterator[None]:
        """A step that every stage takes, and none goes beyond before all have. One that fails ends all, at once.

        promised: keys that this stage publishes on the way, and others wait for with `made`.
        """
        key = f"{what}/{self.rank}"
        with self._telling(key, *promised):
            yield
        self.publish(key, "made ")
        for rank in range(self.world):
            self.made(f"{what}/{rank}", rank)

    def leave(self) -> None:
        """The last step of a run that went well: the process that serves the store is the last to go."""
        if not self.serves:
            self.publish(f"left/{self.rank}", "made ")
            return
        for rank in range(1, self.world):
            self.made(f"left/{rank}", rank)

    @contextmanager
    def _telling(self, *keys: str) -> Iterator[None]:
        """Whoever waits for one of the keys learns of a failure instead."""
        try:
            yield
        except BaseException as error:
            for key in keys:
                self.publish(key, f"failed stage {self.rank}: {told(error)}")
            raise

    def made(self, key: str, rank: int) -> str:
        """What stage `rank` published as `made TEXT`. Raises PeerStopped if it failed, WaitTimeout after the limit."""
        word, _, text = self.get(key, f"stage {rank}").partition(" ")
        if word == "failed":
            raise PeerStopped(text)
        return text

    def publish(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def get(self, key: str, whom: str) -> str:
        """The value that `whom` publishes. Raises WaitTimeout after the limit."""
        try:
            self.store.wait([key], timedelta(seconds=self.timeout))
        except DistError:
            raise WaitTimeout(
                f"stage {self.rank} waited {self.timeout:g} s for {whom} to publish its {key} (transport.timeout)"
            ) from None
        return str(self.store.get(key).decode())

    def part(self, name: str) -> Store:
        """A part of the store, for those who use nothing else of it."""
        return PrefixStore(name, self.store)

    def address(self, scheme: str, chosen: str, folder: Path) -> str:
        """Where to listen for the next stage: a socket file on one machine, else this machine's own address."""
        if scheme == "auto":
            scheme = "ipc" if self.machines == 1 else "tcp"
        if scheme == "ipc":
            return f"ipc://{folder}/{self.rank}"
        host = self.host(chosen)
        return f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"

    def host(self, chosen: str) -> str:
        """The one address of this machine to listen on for tcp: the chosen one, else as narrow as it can be."""
        return chosen or (LOOPBACK if self.machines == 1 else self._own_address())

    def _own_address(self) -> str:
        """The address of the interface that reaches the master: what packets would carry, though none is sent."""
        family, kind, protocol, _, target = socket.getaddrinfo(self.master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            host = str(probe.getsockname()[0])
        if host.startswith("127.") and self.master not in (LOOPBACK, "localhost"):
            raise ConfigError(
                f"{self.master}, the master's name, is {target[0]} here, which no other machine can reach: start with "
                "the master's address instead of its name, or set transport.address on this machine"
            )
        return host


def socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that only this user may enter (0700), for socket files; short, since their paths may have 107 bytes."""
    return tempfile.TemporaryDirectory(prefix="dnipipe-")
