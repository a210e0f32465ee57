"""A loaded dataset: checked transitions, their spaces, statistics and environment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from iql_torchrl.data import replay
from iql_torchrl.data.digests import episode_digests, fingerprint, sketch_of
from iql_torchrl.data.flat_actions import FlatActions, flat_space
from iql_torchrl.data.schema import DatasetError, Key
from iql_torchrl.data.summary import DatasetSummary
from iql_torchrl.data.windows import Windows

__all__ = ["OfflineDataset"]


@dataclass(frozen=True, repr=False)
class OfflineDataset(DatasetSummary):
    """Transitions that passed every check, with their spaces, statistics and environment.

    The other attributes are those of ``DatasetSummary``.

    Attributes:
        transitions: batch ``(N,)`` in TorchRL's layout: ``observation`` (nested for Dict spaces),
            ``action``, ``("next", "observation")``, ``("next", "reward")`` (mapped, ``(N, 1)``),
            ``("next", "terminated" | "truncated" | "done")`` bool ``(N, 1)`` (done: terminated or
            truncated), and int64 ``("collector", "traj_ids")`` ``(N,)``, which number the episodes.
            A row may terminate inside an episode if trajectories continue after a goal.
            ``action_mask``, ``("next", "action_mask")`` bool ``(N, n)`` and ``action_log_prob``
            ``(N,)`` where the source has them. Episodes are complete, consecutive and in the source's
            order.
    """

    transitions: TensorDict

    def __len__(self) -> int:
        return int(self.transitions.batch_size[0])

    @property
    def masked(self) -> bool:
        return "action_mask" in self.transitions

    def range_of(self, key: Key) -> tuple[float, float]:
        low, high = self.transitions[key].aminmax()
        return float(low), float(high)

    def sketch(self) -> NDArray[np.int64]:
        return sketch_of(episode_digests(self))

    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.transitions)

    def replay_buffer(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        seed: int | None = None,
        *,
        capacity: int | None = None,
        **kwargs: Any,
    ) -> TensorDictReplayBuffer:
        """A TorchRL buffer of the transitions; see ``data.replay_buffer``."""
        return replay.replay_buffer(
            self.transitions, batch_size, device=device, seed=seed, capacity=capacity, **kwargs
        )

    def device_sampler(
        self, batch_size: int, device: torch.device | str | None = None, seed: int | None = None
    ) -> replay.DeviceSampler:
        """A ``DeviceSampler`` of the transitions."""
        return replay.DeviceSampler(self.transitions, batch_size, device=device, seed=seed)

    def windows(self, length: int, *, stack: bool = False, jumps: str = "error") -> Windows:
        """The transitions with the last ``length`` observations in place of one.

        See ``data.Windows``: padding, masks, memory, ``stack`` and ``jumps``.
        """
        return Windows(
            self.transitions,
            self.episode_lengths,
            length,
            stack=stack,
            jumps=jumps,
            name=self.name,
        )

    def frame_stack(self, length: int, *, jumps: str = "error") -> Windows:
        """:meth:`windows` whose frames are stacked into one observation, without masks.

        ``frame_stack(1)`` has the entries of plain rows and holds every observation once.
        """
        return self.windows(length, stack=True, jumps=jumps)

    def flatten_actions(self) -> OfflineDataset:
        """The same data with actions ``(A,)`` in place of a Box of another shape.

        ``make_env`` then takes such actions too. Raises ``DatasetError`` where actions are no Box.
        """
        space = flat_space(self.action_space, self.name)
        transitions = self.transitions.copy()
        transitions["action"] = self.transitions["action"].reshape(len(self), -1)
        env = FlatActions(self.make_env, self.name)
        return replace(self, transitions=transitions, action_space=space, env=env)

    def split(self, fraction: float, seed: int) -> tuple[OfflineDataset, OfflineDataset]:
        """Two datasets of complete episodes, the first with ``fraction`` of them, drawn at random.

        Both keep this dataset's order, episode numbers, statistics and reward map, so that numbers
        from one mean the same in the other. Both are copies in memory. Raises ``DatasetError``
        where one side would be empty.
        """
        count = len(self.episode_lengths)
        first = round(fraction * count)
        if not 0 < first < count:
            raise DatasetError(
                f"{self.name}: split({fraction}) of {count} episodes leaves one side empty."
            )
        chosen = np.zeros(count, np.bool_)
        chosen[np.random.default_rng(seed).permutation(count)[:first]] = True
        return self._part(chosen), self._part(~chosen)

    def _part(self, episodes: NDArray[np.bool_]) -> OfflineDataset:
        rows = torch.from_numpy(np.flatnonzero(np.repeat(episodes, self.episode_lengths)))
        return replace(
            self,
            transitions=self.transitions[rows],
            episode_returns=self.episode_returns[episodes],
            episode_lengths=self.episode_lengths[episodes],
        )
