"""The processes of a command that trains: the same command once more for each stage, all with the same settings.

settings ──► a file in a temporary folder ──► dnipipe WORD FILE --output.run=RUN, once a stage

Not a file in the run's folder: what lies there is written by stage 0, once it is sure that there will be a run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dnipipe.config import Config
from dnipipe.disk import disk
from dnipipe.errors import SplitError
from dnipipe.folders import write_config
from dnipipe.started import importing

TEMPORARY = "name a folder for temporary files with TMPDIR"


def launched(word: str, config: Config, run: Path, *options: str, debug: bool) -> int:
    """Run `dnipipe WORD` for each stage, with these settings, in the folder `run`. Returns the exit status.

    Raises SplitError, before any is started, if there are more stages than layers; ConfigError.
    """
    with importing():  # torch comes with it, for which a health check has no use
        from dnipipe.launcher import launch

    check_layers(config)
    with _temporary() as folder:
        path = write_config(folder, config, TEMPORARY)
        command = ["-m", "dnipipe", word, str(path), f"--output.run={run}", *options]
        return launch(config.pipeline.stages, command + ["--debug"] * debug, debug=debug)


def check_layers(config: Config) -> None:
    """Raises SplitError if there are more stages than the configured model has layers."""
    from dnipipe.models import layers_of

    check_stages(config.pipeline.stages, layers_of(config))


def check_stages(stages: int, layers: int) -> None:
    """Raises SplitError if the model cannot be cut into so many, as stage 0 would find once all processes are there."""
    if stages > layers:
        raise SplitError(f"{stages} stages, but the model has only {layers} layers: use at most that many stages")


@contextmanager
def _temporary() -> Iterator[Path]:
    with ExitStack() as stack:
        with disk("cannot make a folder for the settings of the processes", TEMPORARY, start=True):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dnipipe-settings-"))
        yield Path(folder)


__all__ = ["check_layers", "check_stages", "launched"]
