"""nccl beneath ZeroMQ, as far as it can be tested without a GPU: gloo stands in for it, and a wait that does not end.

a ── header by ZeroMQ, tensors ──► b ── waits in a thread of its own, and looks meanwhile whether a is still there
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest
import torch
from torch.distributed import HashStore

from dnipipe.beside import Beside
from dnipipe.errors import ConfigError, PeerLost, WaitTimeout
from dnipipe.messages import Activation
from dnipipe.transport.nccl import NcclBulk, NcclTransport, check_nccl
from tests.transport import conftest
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, Standing

SENT = Activation(4, torch.arange(12.0).reshape(3, 4), torch.tensor([1, 0, 2]))


class Stuck(Beside):
    """A GPU whose kernels do not end before the test says so."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.ended = threading.Event()

    def mark(self, taken: bool = True) -> Callable[[bool], bool]:
        return lambda wait: self.ended.wait(WAIT if wait else 0)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    made = Stuck()
    yield made
    made.ended.set()


def pair(standing: Standing, stuck: Stuck, timeout: float) -> list[NcclTransport]:
    a, b = standing.chain(timeout=timeout)
    assert isinstance(a, NcclTransport) and isinstance(b, NcclTransport)
    (bulk,) = b._bulk.values()
    assert isinstance(bulk, NcclBulk)
    bulk.lines = stuck
    return [a, b]


def test_tensors_that_do_not_come_are_a_wait_timeout(standing: Standing, stuck: Stuck) -> None:
    a, b = pair(standing, stuck, timeout=0.5)
    a.send(NEXT, SENT)
    with pytest.raises(WaitTimeout, match=r"transport\.timeout\) for 72 bytes that the previous stage announced"):
        b.receive([PREVIOUS], WAIT)
    b.close()


def test_a_sender_that_dies_meanwhile_is_noticed(standing: Standing, stuck: Stuck) -> None:
    a, b = pair(standing, stuck, timeout=WAIT)
    a.send(NEXT, SENT)
    dying = threading.Timer(0.2, a._edges[NEXT].cut)
    dying.start()
    with pytest.raises(PeerLost, match="previous stage is gone"):
        b.receive([PREVIOUS], WAIT)
    dying.join()
    b.close()


def test_a_neighbour_that_never_joins_is_a_wait_timeout(standing: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for it without a limit, so it is not asked before both are there."""
    group = Mock()
    monkeypatch.setattr(conftest, "ProcessGroupGloo", group)
    a = standing.one(queue=8, timeout=0.2)
    assert isinstance(a, NcclTransport)
    a.listen(standing.address())
    with pytest.raises(WaitTimeout, match=r"waited 0\.2 s \(transport\.timeout\) for stage n to join by nccl"):
        a.join(NEXT, HashStore())
    group.return_value.send.assert_not_called()


def test_it_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"nccl needs a GPU for each stage, and pipeline.device is cpu: use .*zmq"):
        check_nccl(torch.device("cpu"))
