"""The whole model of a run of independent stages: each has its newest state in a folder of its own, RUN/stage-K."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dnipipe import checkpoint
from dnipipe.agreement import Agreement
from dnipipe.checkpoint import Checkpoint
from dnipipe.errors import CheckpointError
from dnipipe.service.place import START, agreement_of


def weights(run: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the whole model, on the CPU: the newest complete checkpoint's, or where stages have
    states of their own that are newer, theirs.

    Raises CheckpointError if there is neither, or stages are missing.
    """
    agreements = filter(None, map(agreement_of, run.glob(f"stage-*/{START}")))
    agreed = next(agreements, None)  # all of a run have the same
    if agreed is None:
        return checkpoint.weights(run)
    own = [_newest(run / f"stage-{k}") for k in range(Agreement.from_json(agreed).plan.stages)]
    cut = _newest(run)
    if cut and all(state is None or cut.batch >= state.batch for state in own):
        return cut.weights()
    if missing := [str(k) for k, state in enumerate(own) if state is None]:
        raise CheckpointError(
            f"{run} has no state of {'stages' if len(missing) > 1 else 'stage'} {', '.join(missing)}: copy "
            f"{run / 'stage-K'} here from the machine that each of them ran on"
        )
    gathered: dict[str, Tensor] = {}
    for state in own:
        assert state
        gathered.update(state.weights())
    return gathered


def _newest(folder: Path) -> Checkpoint | None:
    try:
        return checkpoint.newest(folder)
    except CheckpointError:
        return None


__all__ = ["weights"]
