"""The observations of a running episode that a policy still reads."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

from iql_torchrl.networks import History

__all__ = ["Seen"]


class Seen:
    """The last observations of one running episode: of ``history.length`` steps, else the current one.

    Earlier ones are copies, because environments may change an array that they have returned.
    """

    def __init__(self, history: History | None) -> None:
        self.history = history
        self._frames: deque[Any] = deque(maxlen=1 if history is None else history.length)

    def start(self, observation: Any) -> None:
        """Forget the episode before; ``observation`` is the first of a new one."""
        self._frames.clear()
        self.add(observation)

    def add(self, observation: Any) -> None:
        """``observation`` follows those before it."""
        keep = self.history is not None and self.history.length > 1
        self._frames.append(copy.deepcopy(observation) if keep else observation)

    def __len__(self) -> int:
        return len(self._frames)

    def read(self) -> Any:
        """The current observation, or with a history the list of the last ones, oldest first."""
        return self._frames[-1] if self.history is None else list(self._frames)
