"""A stage of a user's own script as a service: `dnipipe stage train.py --index K`.

    supervisor ──► the stage's process: runs the script as `python train.py` does, up to its first Run.fit()
                                        └─► fit: its settings, the command line's on top ─► serve(job, K), and the end

What is needed before the script runs (the folder, how often it is started again) is the command line's to say.
"""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dnipipe import config
from dnipipe.building import Job
from dnipipe.config import Config
from dnipipe.errors import ConfigError, UsageError
from dnipipe.process import guarded
from dnipipe.service import place
from dnipipe.service.session import serve
from dnipipe.started import ALONE, Alone


def run_script(script: Path, alone: Alone, seed: int) -> int:
    """The script, in this process, as stage `alone.index` of its first fit. Returns the exit status.

    Every stage's process begins with the same random state, so that models and data that are drawn at random are the
    same in all of them. Raises UsageError if it comes to no fit.
    """
    if not script.is_file():
        raise UsageError(f"cannot read {script}: there is no such file")
    os.environ[ALONE] = alone.to_json()
    sys.argv = [str(script)]
    sys.path.insert(0, str(script.resolve().parent))
    torch.manual_seed(seed)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    raise UsageError(f"{script} came to its end without a Run.fit(), in which it would have been stage {alone.index}")


def serve_alone(job: Job, alone: Alone) -> int:
    """The stage of this job, until it ends. Returns the exit status."""
    return guarded(job, part=lambda job, _: serve(_settled(job, alone), alone.index))[0]


def _settled(job: Job, alone: Alone) -> Job:
    """Raises ConfigError for what the script says otherwise than the command line that started it."""
    settings = job.config
    known = {"output.run": alone.run, "service.restarts": alone.restarts}
    for name, told in known.items():
        if (said := _said(settings, name)) != told and said != _said(Config(), name):
            raise ConfigError(
                f"{name} = {said} in the script, {told} when it was started: what is needed before a script runs is "
                f"the command line's to say: --{name} {said}"
            )
    place.check(settings, alone.index)
    return replace(job, config=config.replace(settings, output={"run": alone.run}))


def _said(settings: Config, name: str) -> object:
    section, _, key = name.partition(".")
    return getattr(getattr(settings, section), key)


__all__ = ["run_script", "serve_alone"]
