"""A policy in one running episode, for programs that call it step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModuleBase

from iql_torchrl.evaluation.act import act, one_observation
from iql_torchrl.evaluation.gym_interface import check_policy
from iql_torchrl.evaluation.seen import Seen
from iql_torchrl.networks import history_of

__all__ = ["Acting"]


class Acting:
    """Actions of ``policy`` in one episode after the other, with the observations that it still reads.

    Call ``reset()`` at the start of every episode, then ``act(observation)`` at each of its steps.
    Actions are those of ``evaluate``. Policies without a history work too.

    Args:
        policy, observation_space, action_space, dtype, deterministic: as for ``evaluation.act.act``.

    Raises ``TypeError`` and ``ValueError`` as ``evaluation.act.act``; a call of ``act`` that raises
    leaves the episode as it was.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        dtype: torch.dtype = torch.float32,
        deterministic: bool = True,
    ) -> None:
        check_policy(policy)
        self.policy = policy
        self._spaces = observation_space, action_space
        self._options: dict[str, Any] = {"dtype": dtype, "deterministic": deterministic}
        self.reset()

    def reset(self) -> None:
        """Begin an episode: the next observation is its first."""
        self._seen = Seen(history_of(self.policy))

    def act(self, observation: Any, *, action_mask: Any = None, seed: int | None = None) -> Any:
        """The action for ``env.step``; ``observation`` is the current one, as ``env`` gives it.

        ``action_mask`` and ``seed``: as for ``evaluation.act.act``.
        """
        history = self._seen.history
        current = one_observation(observation, self._spaces[0])
        given = current
        if history is not None:
            before = self._seen.read() if len(self._seen) else []
            given = _stacked([*before, current][-history.length :])
        action = act(
            self.policy, given, *self._spaces, action_mask=action_mask, seed=seed, **self._options
        )
        self._seen.add(current)
        return action


def _stacked(frames: list[Any]) -> Any:
    """Observations as one with a leading dimension on every leaf."""
    first = frames[0]
    if isinstance(first, dict):
        return {name: _stacked([frame[name] for frame in frames]) for name in first}
    return np.stack(frames)
