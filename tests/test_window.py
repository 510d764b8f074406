"""The automatic window grows for the link's delay, and for nothing else."""

import torch
import torch.nn as nn

from dnipipe import split
from dnipipe.building import window_of
from dnipipe.config import build
from dnipipe.window import Window


def test_a_fixed_window_stays() -> None:
    window = Window(3)
    window.answered(starved=True, blocked=True)
    assert window.size == 3


def test_it_grows_only_if_both_ends_were_idle() -> None:
    for starved, blocked in ((True, False), (False, True), (False, False)):
        window = Window(None)
        for _ in range(50):
            window.answered(starved=starved, blocked=blocked)
        assert window.size == Window.START


def test_it_grows_to_cover_a_delay_and_settles() -> None:
    """A link that holds 20 batches: while the window is smaller, a round trip leaves both ends idle once."""
    window = Window(None)
    for _ in range(20):
        covered = window.size >= 20
        window.answered(starved=not covered, blocked=not covered)
        for _ in range(window.size):
            window.answered(starved=False, blocked=False)
    assert 20 <= window.size < 40


def test_it_stops_at_the_limit() -> None:
    window = Window(None, limit=5)
    for _ in range(200):
        window.answered(starved=True, blocked=True)
    assert window.size == 5


def test_the_limit_is_what_memory_holds_of_batches_and_of_the_weights_that_wait_with_them() -> None:
    """Stage 0: 4 tensors (64, 32) a batch, 32 KiB, and 33·32 weights, 4.1 KiB a copy; then half is for graphs."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    x, y = torch.randn(64, 32), torch.randint(3, (64,))
    planned = split.plan(model, 2, (1,), x, y, 3)
    limits = []
    for stash in (False, True):
        config = build({"pipeline": {"memory": 1, "stages": 2}, "rule": {"name": "delayed", "stash": stash}})
        limits.append(window_of(config, planned, 0).limit)
    assert limits == [2**20 // (4 * 64 * 32 * 4), 2**19 // ((4 * 64 * 32 + 33 * 32) * 4)] == [32, 14]
