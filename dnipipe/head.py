"""What stage 0 has besides its layers: it draws the batches, places the markers, and collects what comes back.

    script:   Activation 1, 2, …, n   Evaluation …   Checkpoint n   Activation n+1 …   Evaluation …  (queries)  Stop
    take:     Answer, Saved, Report from every stage

The script is the run, in order; the worker asks for its next message whenever the window has room.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.config import Config, flat
from dnipipe.data import Task, check_batch, drawn
from dnipipe.display import Display
from dnipipe.errors import DataError
from dnipipe.messages import Activation, Answer, Checkpoint, Evaluation, Message, Report, Saved, Stop
from dnipipe.metrics import StageMetrics, TensorBoard
from dnipipe.pairs import parted


class Head:
    """The run as stage 0 sees it.

    Args:
        start: the batch id of the checkpoint that the run continues from; 0 begins.
        total: the last batch id.
    """

    def __init__(
        self, config: Config, task: Task, run: Path, metrics: StageMetrics, display: Display, start: int, total: int
    ) -> None:
        self.config, self.task, self.run, self.metrics, self.display = config, task, run, metrics, display
        self.batch, self.start, self.total = start, start, total
        self.evaluation: tuple[float, float | None] | None = None
        self.sample = ""
        self.interrupted = False
        self.finals: dict[int, dict[str, float]] = {}
        self._board = TensorBoard(run / "tensorboard") if config.output.tensorboard else None
        self._saved: dict[int, set[int]] = defaultdict(set)
        self._asked = 0  # id of the last Evaluation
        self._answers: dict[int, Tensor] = {}
        self._open: dict[int, list[int]] = {}  # the batch after which an evaluation stands: the ids it consists of
        self._script = self.script()

    def next(self) -> Message | None:
        """The next message for stage 0; None while the script waits for an answer."""
        return next(self._script)

    def interrupt(self) -> None:
        """End soon and in order: a checkpoint, then Stop."""
        self.interrupted = True

    # -- the script --------------------------------------------------------------------------------------------

    def script(self) -> Iterator[Message | None]:
        every_eval, every_save, saved = self.config.eval.every, self.config.checkpoint.every, self.start
        for batch, x, y in drawn(self.task, self.config.train.seed, self.start, self.total):
            if self.interrupted:
                break
            self.batch = batch
            h, along = parted(x)
            yield Activation(batch, h, y, along=along)
            if every_eval and batch % every_eval == 0 and batch < self.total:
                yield from self._evaluate(batch)
            if every_save and batch % every_save == 0:
                saved = batch
                yield Checkpoint(batch)
        if saved != self.batch:
            yield Checkpoint(self.batch)
        if not self.interrupted:
            yield from self._evaluate(self.batch)
            yield from self._write_text()
        yield Stop(self.batch)

    def _evaluate(self, batch: int) -> Iterator[Message | None]:
        """All of the validation data, to the last sample, through the same stages."""
        if self.task.validation is None:
            return
        ids = self._open[batch] = [-1]  # stays open until the last one is asked
        for number, pair in enumerate(self.task.validation, start=1):
            if self.interrupted:  # an unfinished evaluation is none
                del self._open[batch]
                return
            given, y = check_batch(pair, self.task.classes, number)
            x, along = parted(given)
            self._asked += 1
            ids.append(self._asked)
            yield Evaluation(self._asked, x, y, along)
        if ids == [-1]:
            raise DataError(
                f"the validation data has no batch after training batch {batch}: a generator is at its end after one "
                "evaluation, so pass a list of batches, or a DataLoader"
            )
        ids.remove(-1)
        self._score()

    def _write_text(self) -> Iterator[Message | None]:
        """Generate text, one query a byte: the model as it stands, all of its stages."""
        if self.task.prompt is None or not self.config.eval.sample:
            return
        text, context = self.task.prompt, self.task.prompt.shape[1]  # (1, T) int64
        generator = torch.Generator().manual_seed(self.config.train.seed)
        for _ in range(self.config.eval.sample):
            if self.interrupted:
                break
            self._asked += 1
            yield Evaluation(self._asked, text[:, -context:], None)
            while self._asked not in self._answers:
                yield None
            answer = self._answers.pop(self._asked)
            if not answer.numel():  # lost with the stage that had it (service/)
                break
            logits = answer[0, -1].float().cpu()
            drawn = torch.multinomial((logits / 0.8).softmax(0), 1, generator=generator)
            text = torch.cat([text, drawn.view(1, 1)], dim=1)
        self.sample = bytes(text[0, context:].tolist()).decode(errors="replace")

    # -- what comes back ---------------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        if isinstance(message, Answer):
            self._answers[message.batch] = message.h
            self._score()
        elif isinstance(message, Saved):
            self._saved[message.batch].add(message.stage)
            if len(self._saved[message.batch]) == self.config.pipeline.stages:
                self._complete(message.batch)
        elif isinstance(message, Report):
            if message.final:
                self.finals[message.stage] = message.numbers
                return
            self.display.update(message)
            if self._board:
                self._board.write(message.stage, message.batch, message.numbers)

    def close(self) -> None:
        self.display.close()
        if self._board:
            self._board.close()

    def _score(self) -> None:
        """Close every evaluation of which all answers are here."""
        for batch, ids in list(self._open.items()):
            if all(number in self._answers for number in ids):
                total, correct, terms, _ = torch.stack([self._answers.pop(number) for number in ids]).unbind(1)
                accuracy = (correct.sum() / terms.sum()).item() if (correct >= 0).all() else None
                self.evaluation = ((total.sum() / terms.sum()).item(), accuracy)
                del self._open[batch]
                self.metrics.evaluated(batch, *self.evaluation)
                self.display.evaluation(batch, *self.evaluation)

    def _complete(self, batch: int) -> None:
        """Every stage has saved: the manifest makes it a checkpoint."""
        del self._saved[batch]
        settings: dict[str, Any] = dict(flat(self.config))
        with self.metrics.clock.span("checkpoint"):
            checkpoint.complete(self.run, batch, self.config.pipeline.stages, settings, self.config.checkpoint.keep)
