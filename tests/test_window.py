"""The automatic window grows for the link's delay, and for nothing else."""

from collections import deque
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from dnipipe import split
from dnipipe.building import window_of
from dnipipe.config import build
from dnipipe.gradient_rules import Blend, Delayed
from dnipipe.learner import Learner
from dnipipe.messages import Activation, Message
from dnipipe.predictors import VFBN
from dnipipe.window import Window
from tests.conftest import make_stages


def test_a_fixed_window_stays() -> None:
    window = Window(3)
    window.answered(starved=True, blocked=True, now=1.0, waited=1.0)
    assert window.size == 3


def test_it_grows_only_if_both_ends_were_idle() -> None:
    for starved, blocked in ((True, False), (False, True), (False, False)):
        window = Window(None)
        for _ in range(50):
            window.answered(starved=starved, blocked=blocked, now=1.0, waited=0.0)
        assert window.size == Window.START


def begun(window: Window, step: float, delay: float, slower: float = 1.0, batches: int = 300) -> list[float]:
    """When a stage begins each batch: one takes `step` seconds, and in the next stage `slower` times that."""
    now = free = waited = 0.0  # free: when the next stage is
    times: list[float] = []
    answers: deque[tuple[float, bool]] = deque()  # when the gradient is here, and whether the next stage had starved
    for _ in range(batches):
        while answers and (answers[0][0] <= now or len(answers) >= window.size):
            full = len(answers) >= window.size
            at, starved = answers.popleft()
            blocked = full and at > now
            now, waited = max(now, at), waited + max(0.0, at - now)
            window.answered(starved=starved, blocked=blocked, now=now, waited=waited)
        times.append(now)
        now += step
        starved = now + delay > free
        free = max(free, now + delay) + step * slower
        answers.append((free + delay, starved))
    return times


@pytest.mark.parametrize(("step", "within"), [(0.2, 5), (0.1, 5), (0.05, 10), (0.02, 20), (0.01, 30), (0.005, 30)])
def test_it_soon_covers_a_delay_and_takes_no_more_than_it_needs(step: float, within: int) -> None:
    """100 ms each way: from then on hardly a batch waits, and the window is not much larger than it has to be."""
    window = Window(None)
    times = begun(window, step, delay=0.1)
    assert times[-1] - times[within] < 1.02 * (len(times) - 1 - within) * step
    assert window.size <= 1.5 * (0.2 / step + 2)


def test_a_slow_next_stage_is_not_taken_for_a_delay() -> None:
    """It is starved for its first batches alone: more under way would only queue."""
    window = Window(None)
    times = begun(window, 0.01, delay=0.001, slower=3.0)
    assert window.size <= 4 and times[-1] - times[100] == pytest.approx(199 * 0.03)


def test_it_stops_at_the_limit() -> None:
    window = Window(None, limit=5)
    for _ in range(200):
        window.answered(starved=True, blocked=True, now=1.0, waited=0.0)
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


def test_batches_that_are_larger_than_the_first_leave_room_for_fewer() -> None:
    """A sample that waits in stage 0 takes 64 bytes, x (8), h (6) and its label; under way are 100 samples at most.

    Not fewer than two batches, however large, and with a large one seen, one more such has to fit.
    """
    stages = make_stages([nn.Linear(8, 6), nn.Linear(6, 3)], lambda k: Delayed(), partial(torch.optim.SGD, lr=0.1))
    window, batch, under_way = Window(50, memory=100 * 64), 0, []
    for samples in (10, 40, 70, 10):
        sent: list[Message] = []
        while stages[0].room(window):
            batch += 1
            sent += stages[0].handle(Activation(batch, torch.randn(samples, 8), torch.randint(3, (samples,))))
        under_way.append(stages[0].in_flight)
        assert stages[0].waiting == samples * 64 * under_way[-1]
        for answer in [answer for message in sent for answer in stages[1].handle(message)]:
            list(stages[0].handle(answer))
        assert stages[0].waiting == stages[0].in_flight == 0
    assert under_way == [10, 2, 2, 4]


def test_what_waits_is_counted_with_the_weights_that_wait_with_it() -> None:
    """A stash of Linear(8, 6) is 54 floats; the guess of `blend` and what it sends back are counted too."""
    learner = Learner(VFBN(nn.Linear(6, 3), F.cross_entropy, 0.0), 1e-2)
    modules: list[nn.Module] = [nn.Linear(8, 6), nn.Linear(6, 3)]
    stages = make_stages(modules, lambda k: Blend(learner, 0.5, stash=True), partial(torch.optim.SGD, lr=0.1))
    list(stages[0].handle(Activation(1, torch.randn(10, 8), torch.randint(3, (10,)))))
    assert stages[0].waiting == 10 * (8 + 6 + 6) * 4 + 10 * 8 + 54 * 4
