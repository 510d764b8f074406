"""Train a model of your own: `Run(model, stages=4, loss=..., optimizer=...).fit(loader)`.

    python train.py            fit() starts the same script again, once for each stage; each copy works inside its fit()
        ├── stage 0            and ends there. The launching process goes on behind fit(), with the trained weights.
        ├── stage 1
        └── …
    torchrun train.py          the processes are there already: fit() works in each of them, and each goes on behind it
    dnipipe stage train.py --index K      this process is stage K, by itself (service/own.py), and ends with it

So what stands before fit() in a script runs in every process, as under torchrun; what stands behind it runs once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch.nn as nn
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.children import check_stages
from dnipipe.config import Config, Output, build, over, replace
from dnipipe.data import Batches, Task
from dnipipe.errors import ConfigError, UsageError
from dnipipe.folders import begun
from dnipipe.launcher import launch
from dnipipe.optim import OptimizerFactory
from dnipipe.predictors import Loss
from dnipipe.started import HERE, LAUNCHED, Alone, alone, importing, is_worker

if TYPE_CHECKING:
    from dnipipe.building import Job
    from dnipipe.process import Work

VERIFIED, DIFFERS = "verified", "differs"  # in the place of a folder, for the processes of later fits

_fits = 0  # how many fits this script has begun: which one a started process belongs to


class Run:
    """A training run of a user's nn.Sequential, cut into stages that never wait.

    Args:
        model: an nn.Sequential; it is cut between its children. Its weights at `fit` are the initial ones.
        stages: K, the number of processes; or the first layers of the stages after the first, as a list.
        loss: (output, labels) -> mean loss over the batch.
        optimizer: parameters -> optimizer; called in each stage with the stage's own.
        rule: synthetic, blend, local, delayed or wait (gradient_rules.py), or sync (sync.py); or the rule with settings
            of its own, e.g. {"name": "blend", "stash": False}.
        schedule: batch id, from 1 -> factor on the learning rate, the same on every stage.
        clip: largest norm of a stage's gradient (optimizer.clip); 0: no limit.
        settings: any other setting by section, e.g. predictor={"name": "linear"}, train={"seed": 1},
            output={"run": "runs/mine"}.

    Raises ConfigError, here and now, for a setting that is unknown or wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: int | list[int] = 4,
        *,
        loss: Loss,
        optimizer: OptimizerFactory,
        rule: str | Mapping[str, Any] = "blend",
        schedule: Callable[[int], float] | None = None,
        clip: float = 0.0,
        **settings: dict[str, Any],
    ) -> None:
        if "data" in settings:
            raise ConfigError("[data] is for dnipipe train: a script's batches are those given to fit")
        if not callable(optimizer):
            raise ConfigError(
                f"optimizer is a {type(optimizer).__name__}: expected what makes one of a stage's parameters, as "
                "lambda parameters: torch.optim.AdamW(parameters, 1e-3); a limit on the gradient is clip=1.0"
            )
        self._model, self._loss, self._optimizer, self._schedule = model, loss, optimizer, schedule
        cut = {"stages": stages} if isinstance(stages, int) else {"stages": len(stages) + 1, "boundaries": stages}
        self._settings: dict[str, dict[str, Any]] = {
            **settings,
            "pipeline": {**settings.get("pipeline", {}), **cut},
            "rule": dict(rule) if isinstance(rule, Mapping) else {"name": rule},
            "optimizer": {"clip": clip},
        }
        self._built(self._settings)
        self.folder: Path | None = None

    def fit(
        self,
        train: Batches,
        validation: Batches | None = None,
        epochs: int | None = None,
        *,
        resume: str | Path | None = None,
    ) -> dict[str, Any]:
        """Train; returns the run's summary (its keys: docs/files.md).

        Args:
            train: batches (x, y), again from the start each epoch: a DataLoader, a list of batches. x is a tensor, or a
                pair of which the second, a mask, needs no gradient. Without a length only if train.batches is set. Its
                order may use torch's global random state, which the seed and the epoch decide.
            validation: evaluated at the end, and every eval.every batches.
            epochs: passes over `train`; if left out as train.epochs says, 1 if that does not either.
            resume: the folder of a run to continue from its newest complete checkpoint.

        Raises UsageError for what can be mended; ends the script with status 1 if a stage fails.
        """
        passes = {} if epochs is None else {"epochs": epochs}
        values = {**self._settings, "train": {**self._settings.get("train", {}), **passes}}
        if how := alone():
            self._serve(how, self._built(over(values, how.settings)), train, validation, resume is not None)
        config = self._built(values)
        here = is_worker() or config.transport.kind == "local"
        work = partial(self._train, config, train, validation, resume is not None)
        return self._read(self._start(work, here, str(resume) if resume else ""))

    def _serve(self, how: Alone, config: Config, train: Batches, validation: Batches | None, resume: bool) -> NoReturn:
        """`dnipipe stage SCRIPT`: this process is one stage, and ends with it."""
        with importing():
            from dnipipe.service.own import serve_alone

        if resume:
            raise UsageError("fit(resume=…): a stage by itself goes on from its own state; leave it out")
        sys.exit(serve_alone(self._job(config, train, validation), how))

    def verify(self, train: Batches, batches: int = 20) -> bool:
        """Show that K stages, under sync and under wait, learn what one process with plain autograd learns.

        Prints a line a comparison, with the first weight that differs; returns whether none does. In float64, without
        dropout layers, of the first `batches` of an epoch; the model stays as it is. Raises UsageError under torchrun.
        """
        started = _starts_its_own("Run.verify()")
        with tempfile.TemporaryDirectory(prefix="dnipipe-verify-") as folder:
            run = self._start(partial(self._verify, train, batches), started, str(Path(folder) / "run"))
            if started:  # in a process of a later fit: this was done before
                return str(run) == VERIFIED
            from dnipipe import verify  # what a launching process has no use for until now

            equal, lines = verify.read(run)
            _folders[-1] = VERIFIED if equal else DIFFERS
        print("\n".join(lines), flush=True)
        return equal

    def compare(self, train: Batches, validation: Batches | None = None, batches: int = 200) -> None:
        """Train `batches` batches as configured, then as many under sync, and print what both came to, samples/s, loss
        and peak memory, and which to choose. The model here stays as it is. Where the script does not seed what its
        model's weights are drawn from, the two begin with different ones.

        Raises UsageError under torchrun, ConfigError for what sync could not do.
        """
        from dnipipe import compare  # what a launching process has no use for until now
        from dnipipe.building import first_batch

        started = _starts_its_own("Run.compare()")
        config = self._built(self._settings)
        both, said = compare.sides(config, batches, len(first_batch(_task(train, validation))[1]))
        sides: list[compare.Side] = []
        with nullcontext(Path()) if started else begun(Output(dir=config.output.dir), "compare") as above:
            for name, settings in both.items():
                if not started:
                    print(*said, f"{name}: {batches} batches, rule {settings.rule.name}", sep="\n", flush=True)
                work = partial(self._train, settings, train, validation, False)
                folder = self._start(work, started, str(above / name))
                sides.append(compare.side(folder, settings.rule.accumulate))
                said = []
        print("\n".join(compare.report(sides[0], sides[1], batches)), flush=True)

    def model(self) -> nn.Module:
        """The whole model with its trained weights: the module given to Run, in this process."""
        if self.folder is None:
            raise UsageError("Run.model() before Run.fit(): there are no trained weights yet")
        self._model.load_state_dict(checkpoint.weights(self.folder))
        return self._model

    def _read(self, folder: Path) -> dict[str, Any]:
        self.folder = folder
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return summary

    def _start(self, work: Callable[[str], Path], here: bool, folder: str = "") -> Path:
        """Have a run's work done: in this process, as one of its stages or all of them, or else in copies of this
        script.

        folder: the run's; "" for a new one, which is for stage 0 to make, or for the process that starts the copies.
        Returns it.
        """
        global _fits
        _fits += 1
        started = json.loads(os.environ.get(LAUNCHED, "null"))  # the folders of this script's runs, up to the one meant
        if started is not None and _fits < len(started):
            return _of_an_earlier(started[_fits - 1])
        if started is not None:
            folder = started[-1]
        _folders.append("")
        if here:
            done = work(folder)
            if started is not None:
                sys.exit(0)  # what stands behind fit() is for the launching process
            _folders[-1] = str(done)
            return done
        stages = self._settings["pipeline"]["stages"]
        if isinstance(self._model, nn.Sequential):
            check_stages(stages, len(self._model))
        with nullcontext(Path(folder)) if folder else begun(self._built(self._settings).output, "fit") as made:
            # the copies begin where this process began, and the script may have moved since
            _folders[-1] = str(made if os.getcwd() == HERE else made.absolute())
            status = launch(stages, _own_command(), json.dumps(_folders), where=HERE)
            if status:
                sys.exit(status)
        return made

    def _built(self, values: Mapping[str, Any]) -> Config:
        return build(values, scheduled=self._schedule is not None)

    def _train(self, config: Config, train: Batches, validation: Batches | None, resume: bool, folder: str) -> Path:
        config = replace(config, output={"run": folder or config.output.run})
        return _guarded(self._job(config, train, validation), resume)

    def _verify(self, train: Batches, batches: int, folder: str) -> Path:
        from dnipipe import verify

        job = verify.prepared(self._job(self._built(self._settings), train, None), batches, Path(folder))
        return _guarded(job, part=verify.work)

    def _job(self, config: Config, train: Batches, validation: Batches | None) -> Job:
        from dnipipe.building import Job  # what a launching process has no use for

        loss, task = partial(_one_number, self._loss), _task(train, validation)
        return Job(config, lambda: self._model, loss, self._optimizer, lambda: task, self._schedule, script=True)


def _task(train: Batches, validation: Batches | None) -> Task:
    return Task(train, validation, classes=None, corpus="the loader given to fit", baseline=None, prompt=None)


def _starts_its_own(what: str) -> bool:
    """Whether this is a process that it has started. Raises UsageError if somebody else starts the processes."""
    if alone():
        raise UsageError(f"{what} is not for one stage by itself: run the script without dnipipe stage")
    if is_worker() and LAUNCHED not in os.environ:
        raise UsageError(f"{what} starts its processes itself: run the script without torchrun")
    return LAUNCHED in os.environ


def _one_number(loss: Loss, h: Tensor, y: Tensor) -> Tensor:
    """The user's loss. Raises ConfigError if it gives anything else, where that would be a puzzle later."""
    value = loss(h, y)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(f"loss gave {what} for an output {tuple(h.shape)}: expected one number, the batch's mean")
    return value


def _guarded(job: Job, resume: bool = False, part: Work | None = None) -> Path:
    with importing() if is_worker() else nullcontext():  # and what the script has imported, in a process of the run's
        from dnipipe.process import guarded

    status, folder = guarded(job, resume, part=part, name="fit")
    if status:
        sys.exit(status)
    return folder


_folders: list[str] = []  # of the runs that this process has begun; "" for one that was refused


def _of_an_earlier(folder: str) -> Path:
    """Of a fit that the launching process has gone through before: it is done, or was refused there as it is here."""
    if not folder:
        raise UsageError("this fit was refused in the process that starts the others, which says why")
    return Path(folder)


def _own_command() -> list[str]:
    """The arguments with which this Python was started, to start it so again."""
    arguments = sys.orig_argv[1:]
    if not arguments or arguments == ["-"] or hasattr(sys, "ps1"):
        raise UsageError(
            "this script is to be started again, once for each stage, and there is none: this is an interactive "
            "session. Save it as a file and run: python train.py; or train in this process alone, with "
            "transport={'kind': 'local'}"
        )
    return arguments


__all__ = ["Run"]
