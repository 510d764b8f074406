"""dnipipe: pipeline-parallel training for PyTorch whose stages never wait (Decoupled Neural Interfaces)."""

from dnipipe.config import Config
from dnipipe.errors import DnipipeError
from dnipipe.run import Run

__all__ = ["Config", "DnipipeError", "Run"]
