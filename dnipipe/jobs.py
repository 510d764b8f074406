"""The built-in models and data as a Job: what `dnipipe train` trains."""

from __future__ import annotations

from dnipipe import data, models, optim
from dnipipe.building import Job
from dnipipe.config import Config


def job_of(config: Config) -> Job:
    """Everything that the configuration names."""
    return Job(
        config,
        model=lambda: models.build(config),
        loss=models.loss_of(config),
        optimizer=optim.factory(config),
        task=lambda: data.load(config),
    )
