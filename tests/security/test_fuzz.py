"""Garbage at a stage's port, in short; `python -m benchmarks.fuzz --frames 1000000 --connections 100000` in full."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.fuzz.connections import connections
from benchmarks.fuzz.frames import frames


@pytest.mark.parametrize("seed", [1, 2])
def test_no_frame_is_too_strange(seed: int) -> None:
    """Each is taken for a message, dropped for a reason, or ends the edge; what is good in between is delivered."""
    found = sum(frames(3000, seed), Counter[str]())
    assert found["malformed"] > 1000 and found["too many frames"] and found["another run"] and found["not as agreed"]
    assert found["good ones between, all delivered"] > 20


def test_no_connection_is_too_strange() -> None:
    found = sum(connections(200, 1), Counter[str]())
    assert found["handshake failed"] > 20
