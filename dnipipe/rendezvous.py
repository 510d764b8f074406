"""How the processes of a run find one another: through the c10d store that torchrun, or our own launcher, provides.

    stage 0     makes the agreement (run id, folder, settings, plan) ──► store ──► every other stage
    stage k     binds a free port or a socket file, publishes it     ──► store ──► stage k+1 connects

No port is configured by hand. Every wait has a limit, and a stage that fails tells those who wait for it.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dnipipe.errors import ConfigError, DnipipeError, PeerStopped, WaitTimeout

LOOPBACK = "127.0.0.1"


class Rendezvous:
    """This process's place among the K, and the store they share. Raises ConfigError if started in another way."""

    def __init__(self, timeout: float) -> None:
        try:
            self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            self.machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"not started by torchrun or dnipipe train: {error} is missing or wrong") from None
        except dist.DistError as error:
            raise WaitTimeout(f"rank {self.rank} waited {timeout:g} s for the store of the launcher: {error}") from None
        self.incarnation = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.timeout = timeout
        self.store = dist.PrefixStore(f"dnipipe/{self.incarnation}", store)

    def agree(self, make: Callable[[], str]) -> str:
        """What stage 0 makes, for all. If making it fails there, the others raise PeerStopped at once."""
        if self.rank != 0:
            word, _, text = self.get("agreement", "stage 0").partition("\n")
            if word == "failed":
                raise PeerStopped(text)
            return text
        try:
            text = make()
        except DnipipeError as error:
            self.store.set("agreement", f"failed\n{error}")
            raise
        except BaseException as error:
            self.store.set("agreement", f"failed\nstage 0: {type(error).__name__}: {error}")
            raise
        self.store.set("agreement", f"made\n{text}")
        return text

    def publish(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def get(self, key: str, whom: str) -> str:
        """The value that `whom` publishes. Raises WaitTimeout after the limit."""
        try:
            self.store.wait([key], timedelta(seconds=self.timeout))
        except dist.DistError:
            raise WaitTimeout(
                f"stage {self.rank} waited {self.timeout:g} s for {whom} to publish its {key} (transport.timeout)"
            ) from None
        return str(self.store.get(key).decode())

    def address(self, scheme: str, chosen: str, folder: Path) -> str:
        """Where to listen for the next stage: a socket file on one machine, else this machine's own address."""
        if scheme == "auto":
            scheme = "ipc" if self.machines == 1 else "tcp"
        if scheme == "ipc":
            return f"ipc://{folder}/{self.rank}"
        host = chosen or (LOOPBACK if self.machines == 1 else _own_address(os.environ["MASTER_ADDR"]))
        return f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"


def _own_address(master: str) -> str:
    """The address of the interface that reaches the master: what its packets would carry, though none is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that only this user may enter (0700), for socket files; short, since their paths may have 107 bytes."""
    return tempfile.TemporaryDirectory(prefix="dnipipe-")
