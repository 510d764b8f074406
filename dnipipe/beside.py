"""A GPU's two other lines of work, beside the layers' own: what comes from the main memory, and what goes there.

    up        ─ x 8 ─ finite? ─ g 3 ─ finite? ─ x 9 ─►        what came, and what is asked of it at once
    compute   ── forward 7 ── predictor 7 ── backward 7 ──►   torch's current stream; the host only queues all this
    down      ──────────── h 7 ──────────────── g 7 ─►        when they are made; then they are sent (staging.py)

Between the lines one waits for another on the GPU, never the host: that waits for `up` alone, to hear whether what came
is finite, and for `down`, when it has nothing else to do. Main memory that a GPU reads or writes by itself is pinned;
torch keeps such blocks, so that they are made once.

On a CPU, and where all stages are in one process and so on one line, nothing is beside: the same calls do no more than
`tensor.to(device)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

Done = Callable[[bool], bool]  # whether something is done; True: wait until it is


class Beside:
    """`with beside:` what is started within goes up's way; when it is left, compute waits for that. Not to be nested.

    Args:
        device: where the stage computes.
        lines: whether there are others than compute; on a CPU there never are.
    """

    def __init__(self, device: torch.device, lines: bool = True) -> None:
        self.device = device
        self._up: torch.cuda.Stream | None = None
        self._down: torch.cuda.Stream | None = None
        if device.type == "cuda" and lines:
            self._up = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            self._down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._compute: torch.cuda.Stream | None = None  # while up is the current one

    @property
    def are_there(self) -> bool:
        return self._up is not None

    def __enter__(self) -> None:
        if self._up is not None:
            self._compute = torch.cuda.current_stream(self.device)
            torch.cuda.set_stream(self._up)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._up is not None and self._compute is not None:
            torch.cuda.set_stream(self._compute)
            self._compute.wait_stream(self._up)
            self._compute = None

    def for_compute(self, tensor: Tensor) -> Tensor:
        """What was made beside, and is used by compute from now on: its memory is not given away before that is."""
        if self._up is not None:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor

    def bring(self, tensor: Tensor) -> Tensor:
        """The same on the device."""
        if self._up is None or tensor.is_cuda:
            return tensor.to(self.device)
        if not tensor.is_pinned():
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        with self:
            here = tensor.to(self.device, non_blocking=True)
        return self.for_compute(here)

    def take(self, tensor: Tensor) -> Tensor:
        """A copy in the main memory, which is there once what `mark` returns behind it says so."""
        assert self._down is not None
        tensor = tensor.detach()
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            there.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._down)
        return there

    def mark(self, taken: bool = True) -> Done:
        """Whether all that was taken so far is there; or, not `taken`, all that compute was told to do is done."""
        if self.device.type != "cuda":
            return lambda wait: True
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._down if taken and self._down is not None else torch.cuda.current_stream(self.device))

        def done(wait: bool) -> bool:
            if wait:
                event.synchronize()
            return bool(event.query())  # type: ignore[no-untyped-call]

        return done


NOWHERE = Beside(torch.device("cpu"))


@functools.cache
def beside(device: torch.device, lines: bool) -> Beside:
    """A process's: all that it brings to a device comes the same way."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what torch counts and draws without being told where
    return Beside(device, lines)


__all__ = ["NOWHERE", "Beside", "Done", "beside"]
