"""dnipipe: pipeline-parallel training for PyTorch whose stages never wait (Decoupled Neural Interfaces)."""

from dnipipe.started import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before torch is imported, which takes seconds

from dnipipe.config import Config  # noqa: E402
from dnipipe.errors import DnipipeError  # noqa: E402
from dnipipe.run import Run  # noqa: E402

__all__ = ["Config", "DnipipeError", "Run"]
