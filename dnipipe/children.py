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
from dnipipe.folders import write_config

TEMPORARY = "name a folder for temporary files with TMPDIR"


def launched(word: str, config: Config, run: Path, *options: str, debug: bool) -> int:
    """Run `dnipipe WORD` for each stage, with these settings, in the folder `run`. Returns the exit status."""
    from dnipipe.launcher import launch  # and torch with it, for which a supervisor or a health check has no use

    with _temporary() as folder:
        path = write_config(folder, config, TEMPORARY)
        command = ["-m", "dnipipe", word, str(path), f"--output.run={run}", *options]
        return launch(config.pipeline.stages, command + ["--debug"] * debug, debug=debug)


@contextmanager
def _temporary() -> Iterator[Path]:
    with ExitStack() as stack:
        with disk("cannot make a folder for the settings of the processes", TEMPORARY, start=True):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dnipipe-settings-"))
        yield Path(folder)


__all__ = ["launched"]
