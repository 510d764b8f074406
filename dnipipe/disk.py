"""What the disk refuses, told by one line: what could not be done, why, and the way out."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dnipipe.errors import ConfigError, DiskError

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # what may be over without anything being mended


@contextmanager
def disk(what: str, way: str, start: bool = False) -> Iterator[None]:
    """Raises DiskError, `WHAT: why; WAY`, for an error of the disk.

    start: nothing is under way that would be lost. Then ConfigError, but for what may pass: to try again is worth it.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        line = f"{what}: {error.strerror or error}{_where(error, what)}; {way}"
        if start and error.errno not in PASSING:
            raise ConfigError(line) from error
        raise DiskError(error.errno or errno.EIO, line) from error


def _where(error: OSError, what: str) -> str:
    """The file or folder that is in the way, if it is another than the line begins with."""
    known = error.filename is None or str(error.filename) in what.replace(":", " ").split()
    return "" if known else f" ({error.filename})"


__all__ = ["disk"]
