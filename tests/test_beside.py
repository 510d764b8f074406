"""Where there is one line of work only, on a CPU: nothing is copied, and nothing waits. The others: tests/gpu."""

from __future__ import annotations

import torch

from dnipipe.beside import NOWHERE, beside


def test_a_cpu_has_no_other_lines() -> None:
    lines = beside(torch.device("cpu"), lines=True)
    assert not lines.are_there and not NOWHERE.are_there
    x = torch.arange(3)
    with lines:
        assert lines.bring(x) is x and lines.for_compute(x) is x
    assert lines.mark()(False)
