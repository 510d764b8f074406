"""Everything dnipipe raises on purpose, as one tree.

    DnipipeError
    ├── UsageError            exit status 2: a person can mend it before anything starts
    │   ├── ConfigError       a setting: unknown, of a wrong type, out of range, at odds with another
    │   ├── SplitError        the model cannot be cut as asked
    │   ├── DataError         data missing, malformed, or labels outside the classes
    │   ├── CheckpointError   nothing to resume from, or not this model's
    │   └── TraceError        a run's trace is missing, damaged, or not all of one run
    └── RunError              exit status 1: the run cannot go on
        ├── PeerError         between two neighbours
        │   ├── HandshakeError  the neighbour's Hello does not fit; says which field differs
        │   ├── PeerLost        the neighbour's process, or the link to it, went away
        │   ├── PeerStopped     the neighbour said that it ends, and why
        │   ├── GaveUp          an independent stage: no use in starting it again by itself (exit status 3)
        │   ├── Replaced        another process has taken this stage's place (exit status 0: it is not to come back)
        │   └── WaitTimeout     a limit struck; says who waited for whom, since when, at which batch
        ├── DiskError         a file cannot be written; an OSError too, for those who can do without that file
        ├── MessageError      bytes that are not a message, or a message that does not belong here
        └── NonFiniteLoss     the loss, or what a neighbour sent, is NaN or infinite, and the setting says to stop

A message is one line: the fact, the values, the way out.
"""


class DnipipeError(Exception):
    """Base of every exception that dnipipe raises on purpose."""

    exit_status = 1


class UsageError(DnipipeError):
    """Something a person can mend before anything starts."""

    exit_status = 2


class ConfigError(UsageError):
    """A setting is unknown, of a wrong type, out of range, or at odds with another."""


class SplitError(UsageError):
    """The model cannot be cut into stages as asked."""


class DataError(UsageError):
    """Data is missing or malformed, or labels lie outside the classes."""


class CheckpointError(UsageError):
    """There is no complete checkpoint, or it belongs to another model."""


class TraceError(UsageError):
    """A run's trace is missing, damaged, or not all of one run."""


class RunError(DnipipeError):
    """The run cannot go on."""


class PeerError(RunError):
    """Something went wrong between two neighbouring stages."""


class HandshakeError(PeerError):
    """The neighbour's Hello does not fit this stage's."""


class PeerLost(PeerError):
    """The neighbour's process, or the link to it, went away."""


class PeerStopped(PeerError):
    """The neighbour said that it ends, and why."""


class GaveUp(PeerError):
    """An independent stage ends, and starting it again by itself would not help."""

    exit_status = 3


class Replaced(PeerError):
    """Another process has taken this stage's place."""

    exit_status = 0


class WaitTimeout(PeerError):
    """A wait reached its limit."""


class DiskError(RunError, OSError):
    """A file cannot be written: (errno, the line[, the file's name])."""

    def __str__(self) -> str:
        if self.strerror is None:
            return super().__str__()
        return f"{self.strerror} ({self.filename})" if self.filename else self.strerror


class MessageError(RunError):
    """Bytes that are not a message, or a message that does not belong here. `reason`: what it is counted under."""

    def __init__(self, text: str, reason: str = "malformed") -> None:
        super().__init__(text)
        self.reason = reason


class NonFiniteLoss(RunError):
    """The loss, or what a neighbour sent, is NaN or infinite."""


def told(error: BaseException) -> str:
    """The line that others are told of an error: ours say it all, of any other the type is part of it."""
    if isinstance(error, DnipipeError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
