"""A stage that comes back with another address is found by its name: in a mount namespace, whose hosts are ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.relay import free_port

MOVES = """
import sys
from pathlib import Path
from dnipipe.service.links import Links
from dnipipe.service.place import endpoint
from dnipipe.transport import Side

hosts, port = Path(sys.argv[1]), sys.argv[2]


def stage(k, incarnation):
    return Links(k, 2, incarnation, (), queue=8, timeout=20.0, max_message=2**20)


lower = stage(1, 1)
lower.connect(endpoint(f"upper:{port}"))  # a name that nobody knows yet
for incarnation, address in enumerate(["127.0.0.2", "127.0.0.3"], 1):
    hosts.write_text(f"{address} upper\\n")
    upper = stage(0, incarnation)
    upper.listen(f"tcp://{address}:{port}")
    while not (upper.up(Side.NEXT) and lower.up(Side.PREVIOUS)):
        upper.receive([Side.NEXT], 0.01)
        lower.receive([Side.PREVIOUS], 0.01)
    print("found at", address, flush=True)
    upper.close()
    while lower.up(Side.PREVIOUS):
        lower.receive([Side.PREVIOUS], 0.01)
lower.close()
"""
OWN_HOSTS = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount --bind "$1" /etc/hosts && shift && exec "$@"']


def own_hosts(hosts: Path, *command: str) -> list[str]:
    return [*OWN_HOSTS, "sh", str(hosts), *command]


@pytest.mark.processes
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare (util-linux)")
def test_a_name_is_resolved_anew_at_each_connection(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.touch()
    if subprocess.run(own_hosts(hosts, "true"), capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here")
    command = own_hosts(hosts, sys.executable, "-c", MOVES, str(hosts), free_port())
    moved = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert moved.stdout == "found at 127.0.0.2\nfound at 127.0.0.3\n", moved.stderr
