"""How much memory a stage has had at most: of the GPU if it trains there, else of its process."""

from __future__ import annotations

import resource
import sys

import torch

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def peak_memory() -> int:
    """Bytes: the most that this process's tensors took of its GPU; without one, the process of the main memory, Python,
    torch and data included (with transport.kind = local, all stages together)."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
