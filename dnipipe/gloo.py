"""A gloo process group for the stages of a run: it listens on one address of this machine, and nowhere else.

torch's own choice is the address of the machine's name, which others may reach though all stages are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from dnipipe.errors import ConfigError, WaitTimeout
from dnipipe.rendezvous import Rendezvous
from dnipipe.transport.address import check_address, check_reach

BACKEND = "dnipipe_gloo"


@contextmanager
def joined(meeting: Rendezvous, run: str, address: str, private: bool = False) -> Iterator[None]:
    """All stages of `run` as torch's default process group, for as long as this lasts. `address`: transport.address.

    Raises ConfigError if this process has a group already, or the address cannot be had or, unless the network is
    `private`, is reached by others; WaitTimeout if not all stages come within the limit.
    """
    if dist.is_initialized():
        raise ConfigError(
            "rule.name = sync makes torch's default process group, and this script has made one: destroy it before, "
            "or use another rule"
        )
    _register()
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=meeting.timeout)
    options._devices = [device(meeting.host(address), private)]
    try:
        dist.init_process_group(
            BACKEND,
            store=PrefixStore(f"gloo/{run}", meeting.store),
            rank=meeting.rank,
            world_size=meeting.world,
            timeout=options._timeout,
            pg_options=options,
        )
    except RuntimeError as error:
        raise WaitTimeout(
            f"stage {meeting.rank} waited for the other stages' connections (transport.timeout = {meeting.timeout:g}): "
            f"{error}"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def device(host: str, private: bool) -> Any:
    """What gloo sends and listens by, on one address of this machine. Raises ConfigError."""
    address = f"tcp://[{host}]:*"
    check_address(address)
    check_reach(address, private, cure="gloo has no keys, so use another rule.name than sync")
    try:
        return ProcessGroupGloo.create_device(hostname=host)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {host}: {error}; choose another transport.address") from None


def _register() -> None:
    """Make the backend known to torch. May be called again."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _group, extended_api=True, devices="cpu")


def _group(place: Any, options: Any) -> ProcessGroupGloo:
    """What torch calls to make the group: `place` says where this process stands."""
    return ProcessGroupGloo(place.store, place.group_rank, place.group_size, options)


__all__ = ["device", "joined"]
