"""Random numbers as a function of what they are for, not of what was drawn before: a resumed run draws the same."""

from __future__ import annotations

import hashlib
import zlib

import torch


def reseed(*what: object) -> None:
    """Put torch's global generators where (what…) decides, e.g. reseed(seed, "epoch", 3).

    Not torch.manual_seed: without a GPU that formats three stack traces a call, 0.4 ms, to replay the call later.
    """
    seed = zlib.crc32("/".join(map(str, what)).encode())
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def generator(*what: object) -> torch.Generator:
    """One of its own, on the CPU, where (what…) decides; torch's own generators stay where they are."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, what)).encode()))


def chance(probability: float, *what: object) -> bool:
    """True with this probability, as (what…) alone decides; torch's generators stay where they are.

    A cryptographic hash: the crc32 of one stage's batch ids and of another's differ by a constant, so that the draws of
    two stages would hang together.
    """
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < probability * 2**64
