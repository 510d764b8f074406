"""Where a stage may listen: on one address, and without keys on none that others than this user or machine reach."""

from __future__ import annotations

import ipaddress
import socket
import stat
from pathlib import Path

from dnipipe.errors import ConfigError
from dnipipe.keys import command


def check_address(address: str, listens: bool = True) -> None:
    """Raises ConfigError unless it is ipc with a path, or tcp with a port; who `listens` names one interface, too."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        if not rest or rest[0] in "*@":  # a file in the working folder; an abstract name that any user may connect to
            raise ConfigError(f"{address}: give the path of a socket file, ipc:///folder/file")
        return
    host, colon, port = rest.rpartition(":")
    known = port == "*" or (port.isdecimal() and 0 < int(port) < 2**16)
    if scheme != "tcp" or not colon or not known:
        raise ConfigError(
            f"{address}: expected ipc:///folder/file, or tcp://address:port with a port of 1 to 65535 or *"
        )
    if listens and _is_every_interface(host.strip("[]")):
        raise ConfigError(f"{address} would listen on all interfaces: set transport.address to the one to use")


def _is_every_interface(host: str) -> bool:
    if host in ("", "*"):
        return True
    try:  # by way of the resolver, since 0.0.0.0 has many spellings: 0, 0x0, ::ffff:0.0.0.0
        numbers = {ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (socket.gaierror, ValueError):
        return False  # the name of an interface, or nothing: zmq will say
    mapped = {number.ipv4_mapped for number in numbers if isinstance(number, ipaddress.IPv6Address)}
    return any(number.is_unspecified for number in numbers | mapped if number)


def check_reach(address: str, private: bool, cure: str = "") -> None:
    """Without keys: raises ConfigError if others than this user, or this machine's, could connect to `address`.

    private: security.private_network, by which a person says that only friends can. cure: instead of keys, where there
    are none for this way of listening.
    """
    if private or not (whom := _who_reaches(address)):
        return
    keys = cure or f"set security.keys to a folder of keys, made with `{command(Path('keys'), None)}`"
    raise ConfigError(
        f"{address} can be reached by {whom}, and nothing on it is authenticated or encrypted: {keys}; or, if the "
        "network is private and everybody on it is trusted, set security.private_network = true"
    )


def _who_reaches(address: str) -> str:
    """Who, besides this user (ipc) or this machine (tcp); "" if nobody."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        folder = Path(rest).parent
        loose = folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) & 0o077
        return f"other users of this machine (chmod 700 {folder} keeps them out)" if loose else ""
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return "" if ipaddress.ip_address(host.partition("%")[0]).is_loopback else "other machines"
    except ValueError:  # a name, or an interface's
        return "" if host in ("localhost", "lo") else "other machines"


__all__ = ["check_address", "check_reach"]
