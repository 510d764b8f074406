"""What a batch costs a stage beyond one pass through its layers and back: found by asking its rule for a few.

rule.now, rule.arrived ─► their time, the predictor's        what they answer ─► passes that the stage will make
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnipipe.gradient_rules import GradientRule, Mend, Use
from dnipipe.measuring import REPEATS, Work, lap

SMALL = 1e-3  # size of a made-up gradient


def work_of(rule: GradientRule, h: Tensor, y: Tensor, first: int, graphs: bool, every: int = 1) -> Work:
    """Of a new rule of a stage before the last one, which learns from this and is not to be used again.

    Args:
        h: an output of the stage, (B, D...), on its device. y: labels, (B, ...).
        first: a batch id from which on the rule does what it does for most of the run.
        graphs: whether a graph can wait for its gradient, where the weights under it are kept.
        every: of how many batches one has a gradient come for it.
    """
    g = SMALL * torch.randn_like(h)
    seconds: list[float] = []
    for batch in range(first, first + REPEATS):
        began = lap(h)
        now = rule.now(batch, h, y)
        use = now if isinstance(now, Use) else None
        later = rule.arrived(batch, h, y, g, use.g if use else None)
        seconds.append(lap(h) - began)
        if batch == first:
            again = isinstance(later, Mend) or (later is not None and (later.update or later.send))
            forwards = 1 + int(again and not (graphs and rule.stash is not None)) / every
            backwards = int(use is not None and use.update) + int(again) / every
    return Work(forwards, backwards, min(seconds))


__all__ = ["work_of"]
