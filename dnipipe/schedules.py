"""torch's own schedules (torch.distributed.pipelining) around the layers of one stage, with static shapes.

    1f1b    forward 1 … K, then backward 1, forward K+1, backward 2, …     at most K micro-batches keep a graph
    gpipe   forward 1 … M, then backward 1 … M                             all M do

What it adds: every second of a step has its owner in the stage's clock, and a wait that ends badly says for whom.
A module of its own, for torch.distributed.pipelining takes a second to import.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from dnipipe.errors import PeerError, PeerLost, WaitTimeout
from dnipipe.metrics import StageMetrics
from dnipipe.predictors import Loss

KINDS = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class StaticStage(PipelineStage):
    """A PipelineStage that computes in its stage's clock, knows whom it waits for, and has its shapes from the plan.

    Args:
        measured: whose clock it is; a step is idle but for what is computed in it. The others are PipelineStage's.
    """

    def __init__(self, measured: StageMetrics, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.measured = measured
        self.partner = "its neighbours"

    def forward_one_chunk(self, *arguments: Any, **options: Any) -> Any:
        with self.measured.clock.span("forward"):
            return super().forward_one_chunk(*arguments, **options)

    def backward_one_chunk(self, *arguments: Any, **options: Any) -> Any:
        with self.measured.clock.span("backward"):
            return super().backward_one_chunk(*arguments, **options)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self._with(self.stage_index - 1, super().get_fwd_recv_ops(fwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self._with(self.stage_index + 1, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self._with(self.stage_index + 1, super().get_bwd_recv_ops(bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self._with(self.stage_index - 1, super().get_bwd_send_ops(bwd_chunk_id))

    def _with(self, stage: int, operations: list[Any]) -> list[Any]:
        """Sends or receives that are about to begin, and so to be waited for."""
        if operations:
            self.partner = f"stage {stage}"
        return operations

    def _recv_meta(self, src_stage: int) -> Any:
        """torch's way to ask a neighbour for shapes unpickles the answer. Ours are known, and nobody is asked."""
        raise AssertionError("shapes are static")


class Schedule:
    """The steps of one stage, in the order of the schedule; all stages take each step together.

    Args:
        kind: of KINDS. microbatches: M, equal parts of a batch.
        loss: of one micro-batch (output, labels), a mean; called in the last stage.
        timeout: the longest wait for a neighbour, seconds, for what is said when it strikes: the process group has it.
    """

    def __init__(self, kind: str, stage: StaticStage, microbatches: int, loss: Loss, timeout: float) -> None:
        self.stage, self.timeout = stage, timeout
        self.torchs = KINDS[kind](stage, microbatches, loss_fn=loss)
        kept = "return_outputs" in inspect.signature(self.torchs.step).parameters  # torch before 2.9 always does
        self._options: dict[str, Any] = {"return_outputs": False} if kept else {}

    def step(self, batch: int, inputs: Sequence[Tensor], y: Tensor) -> None:
        """Leave the gradients of the mean loss over the batch in the parameters. inputs (B, ...) are stage 0's alone.

        Raises PeerLost, WaitTimeout; and what the layers and the loss raise.
        """
        try:
            with self.stage.measured.clock.span("wait_input"):  # or for a gradient: torch does not tell them apart
                self.torchs.step(*inputs, target=y if self.stage.is_last else None, **self._options)
        except RuntimeError as error:
            if "gloo/" not in str(error) and "pair closure" not in str(error):
                raise
            raise self._ended(batch, str(error)) from error

    def _ended(self, batch: int, reason: str) -> PeerError:
        me, whom = f"stage {self.stage.stage_index}", self.stage.partner
        if "imed out" in reason or "timeout" in reason:
            return WaitTimeout(
                f"{me} waited {self.timeout:g} s for {whom} in its step of batch {batch} (transport.timeout)"
            )
        said = (reason.partition("] ")[2] or reason).partition(". ")[
            0
        ]  # without gloo's place in its source, and advice
        return PeerLost(f"{me} lost {whom} in its step of batch {batch}: {said}")


__all__ = ["Schedule", "StaticStage"]
