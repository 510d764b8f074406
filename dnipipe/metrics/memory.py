"""How much memory a stage has, and has had at most: of the GPU if it trains there, else of its process."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def peak_memory() -> int:
    """Bytes: the most that this process's tensors took of its GPU; without one, the process of the main memory, Python,
    torch and data included (with transport.kind = local, all stages together)."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def memory() -> int | None:
    """Bytes, now; as in `peak_memory`. None where the system does not say it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.memory_allocated()
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else None
