"""The processes of a command that trains: the same command once more for each stage, all with the same settings.

settings ──► a file in a temporary folder ──► dnipipe WORD FILE --output.run=RUN, once a stage

Not a file in the run's folder: what lies there is written by stage 0, once it is sure that there will be a run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from dnipipe.config import Config
from dnipipe.folders import write_config


def launched(word: str, config: Config, run: Path, *options: str, debug: bool) -> int:
    """Run `dnipipe WORD` for each stage, with these settings, in the folder `run`. Returns the exit status."""
    from dnipipe.launcher import launch  # and torch with it, for which a supervisor or a health check has no use

    with tempfile.TemporaryDirectory(prefix="dnipipe-settings-") as folder:
        command = ["-m", "dnipipe", word, str(write_config(Path(folder), config)), f"--output.run={run}", *options]
        return launch(config.pipeline.stages, command + ["--debug"] * debug, debug=debug)


__all__ = ["launched"]
