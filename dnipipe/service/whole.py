"""The whole model of a run of independent stages: each has its newest state in a folder of its own, RUN/stage-K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dnipipe import checkpoint
from dnipipe.agreement import Agreement
from dnipipe.checkpoint import Checkpoint
from dnipipe.errors import CheckpointError
from dnipipe.service.place import START, agreement_of


def parts(run: Path) -> list[Checkpoint]:
    """What the whole model is made of: the newest complete checkpoint, or where stages have states of their own that
    are newer, theirs, stage by stage.

    Raises CheckpointError if there is neither, or stages are missing.
    """
    agreements = filter(None, map(agreement_of, run.glob(f"stage-*/{START}")))
    agreed = next(agreements, None)  # all of a run have the same
    if agreed is None:
        return [checkpoint.newest(run)]
    own = [checkpoint.search(run / f"stage-{k}") for k in range(Agreement.from_json(agreed).plan.stages)]
    found = [state for state, _ in own if state]
    cut, _ = checkpoint.search(run)
    if cut and all(cut.batch >= state.batch for state in found):
        return [cut]
    if missing := [str(k) for k, (state, _) in enumerate(own) if state is None]:
        damaged = "; ".join(why for state, passed in own if state is None for why in passed)
        raise CheckpointError(
            f"{run} has no state of {'stages' if len(missing) > 1 else 'stage'} {', '.join(missing)}: copy "
            f"{run / 'stage-K'} here from the machine that each of them ran on{damaged and f' (damaged: {damaged})'}"
        )
    return found


def notes(parts: Sequence[Checkpoint]) -> Iterator[str]:
    """What it is made of, and what is newer and was passed over, a line each."""
    for part in parts:
        yield from (f"passed over: {why}" for why in part.skipped)
    yield f"saved behind batch {', '.join(str(part.batch) for part in parts)}{' (by stage)' * (len(parts) > 1)}"


def weights(parts: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """Parameters and buffers of the whole model, on the CPU."""
    gathered: dict[str, Tensor] = {}
    for part in parts:
        gathered.update(part.weights())
    return gathered


__all__ = ["notes", "parts", "weights"]
