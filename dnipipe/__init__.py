"""dnipipe: pipeline-parallel training for PyTorch whose stages never wait (Decoupled Neural Interfaces)."""

from typing import TYPE_CHECKING, Any

from dnipipe.started import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before torch is imported, which takes seconds

from dnipipe.config import Config  # noqa: E402
from dnipipe.errors import DnipipeError  # noqa: E402

if TYPE_CHECKING:
    from dnipipe.run import Run


def __getattr__(name: str) -> Any:
    """Run comes when it is asked for, and torch with it: a health check has no use for them."""
    if name != "Run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dnipipe.run import Run

    return Run


__all__ = ["Config", "DnipipeError", "Run"]
