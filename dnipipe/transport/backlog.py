"""What waits for a link that is full, in order. A gradient gives way to newer ones, its answer does not.

spare = 2      Gradient 7, Gradient 8, Answer, Gradient 9  ─►  Gradient 7 without g, Gradient 8, Answer, Gradient 9
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from dnipipe.messages import Gradient, Message


class Backlog:
    """Messages to one neighbour that are not handed to its socket yet.

    Args:
        spare: gradients among them that keep their tensors. Of more, the oldest is left out: its message, which the
            neighbour waits for, goes without, and says so.
    """

    def __init__(self, spare: int) -> None:
        self.spare = spare
        self._messages: deque[Message] = deque()
        self._whole = 0  # gradients with their tensors

    def __len__(self) -> int:
        return len(self._messages)

    def append(self, message: Message) -> None:
        self._messages.append(message)
        self._whole += _is_whole(message)
        if self._whole > self.spare:
            oldest = next(place for place, waiting in enumerate(self._messages) if _is_whole(waiting))
            message = self._messages[oldest]
            assert isinstance(message, Gradient)
            self._messages[oldest] = replace(message, g=None, scale=None, samples=None, full=True)
            self._whole -= 1

    def popleft(self) -> Message:
        message = self._messages.popleft()
        self._whole -= _is_whole(message)
        return message

    def clear(self) -> None:
        self._messages.clear()
        self._whole = 0


def _is_whole(message: Message) -> bool:
    return isinstance(message, Gradient) and message.g is not None


__all__ = ["Backlog"]
