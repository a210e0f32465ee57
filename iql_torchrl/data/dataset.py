"""Loaded datasets: spaces, statistics, episodes and environment, and transitions in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NoReturn, TextIO

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from numpy.typing import ArrayLike, NDArray
from tensordict import TensorDict
from torch.types import Device
from torchrl.data import Composite, TensorDictReplayBuffer, TensorSpec

from iql_torchrl.data import replay
from iql_torchrl.data.chunks import Chunks
from iql_torchrl.data.codec import (
    UNCHANGED,
    Adaptation,
    flat_action_space,
    observation_spec_of,
    spec_of_space,
)
from iql_torchrl.data.digests import episode_digests, fingerprint, sketch_of
from iql_torchrl.data.goals import (
    ACTOR_ORIGINS,
    GoalChoice,
    GoalEnv,
    GoalOrigins,
    GoalSampler,
    Reached,
    Relabelling,
)
from iql_torchrl.data.readers.environments import adapted_env
from iql_torchrl.data.scaling import (
    NAMED_MAPS,
    ObservationStatistics,
    RewardMap,
    StatisticsAccumulator,
    normalised_score,
)
from iql_torchrl.data.schema import ACTION, DatasetError, Key
from iql_torchrl.data.windows import Windows
from iql_torchrl.descriptions import describe_space
from iql_torchrl.networks import History


@dataclass(frozen=True, kw_only=True, repr=False)
class Description:
    """Everything about a checked dataset but its transitions: spaces, statistics and episodes.

    Attributes:
        observation_space, action_space: Gymnasium's spaces; the specs are TorchRL's form of them.
        statistics: per observation key (``"observation"``, or a tuple for nested ones) its
            ``ObservationStatistics``; categories and images have none.
        episode_returns: raw rewards summed over the kept transitions of each episode, float64 ``(E,)``.
        episode_lengths: kept transitions of each episode, int64 ``(E,)``.
        reward_map: the reward scaling of the transitions; apply it to online rewards too.
        reference_scores: raw returns (random, expert), or None.
        notes: what was dropped, guessed or repaired, one sentence each.
        warnings: those of ``notes`` that were issued as ``DatasetWarning``.
        dtype: of observations, continuous actions and rewards.
        env_spec, adaptation: the environment that the data name, and how its observations and
            actions become those of the dataset.
    """

    name: str = "dataset"
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    statistics: dict[str | Key, ObservationStatistics] = field(default_factory=dict)
    episode_returns: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    episode_lengths: NDArray[np.int64]
    reward_map: RewardMap = NAMED_MAPS["raw"]
    reference_scores: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    env_spec: EnvSpec | None = None
    adaptation: Adaptation = UNCHANGED


@dataclass(frozen=True, kw_only=True, repr=False)
class DatasetSummary(Description, ABC):
    """A dataset's description and environment, without its transitions.

    ``OfflineDataset`` has them all in one TensorDict, ``ShardedDataset`` in many.
    """

    env: Callable[[], gym.Env[Any, Any]] | None = None

    def __len__(self) -> int:
        """Number of transitions."""
        return int(self.episode_lengths.sum())

    def __repr__(self) -> str:
        returns, change = self.episode_returns, self.reward_map
        rewards = f", rewards scaled by {change}" if change != RewardMap() else ""
        notes = f"\n  notes: {len(self.notes)}, see print_notes()" if self.notes else ""
        return (
            f"{type(self).__name__} {self.name!r}: {len(self):,} transitions in {len(returns):,} "
            f"episodes\n"
            f"  observation: {describe_space(self.observation_space)}\n"
            f"  action: {describe_space(self.action_space)}\n"
            f"  raw return: mean {returns.mean():.6g}, {returns.min():.6g} to {returns.max():.6g}"
            f"{rewards}{notes}"
        )

    @property
    @abstractmethod
    def masked(self) -> bool:
        """True if each observation has a bool ``action_mask`` ``(n,)``."""

    @abstractmethod
    def range_of(self, key: Key) -> tuple[float, float]:
        """The smallest and the largest number of an entry of all transitions."""

    @abstractmethod
    def sketch(self) -> NDArray[np.int64]:
        """Digests of some of the episodes: ``digests.sketch_of``."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Digests, by name, that are equal only if all transitions are equal bit for bit."""

    def print_notes(self, file: TextIO | None = None) -> None:
        """Print a line ``note: ...`` for each of ``notes``, on standard output or to ``file``."""
        for note in self.notes:
            print(f"note: {note}", file=file)

    @property
    def observation_spec(self) -> Composite:
        """``Composite`` with the key ``observation``, nested below it for Dict spaces."""
        return observation_spec_of(self.observation_space, self.dtype)

    @property
    def action_spec(self) -> TensorSpec:
        """Bounded for Box, Categorical for Discrete, MultiCategorical for MultiDiscrete."""
        return spec_of_space(self.action_space, self.dtype, ACTION)

    def normalised_score(self, returns: ArrayLike) -> NDArray[np.float64]:
        """Raw returns on the scale from 0 (random) to 100 (expert).

        Raises ``DatasetError`` without ``reference_scores``.
        """
        if self.reference_scores is None:
            raise DatasetError(
                f"{self.name}: no reference scores are known; pass reference_scores=(random, "
                "expert) to load_dataset."
            )
        return normalised_score(returns, self.reference_scores)

    @property
    def make_env(self) -> Callable[[], gym.Env[Any, Any]]:
        """A function that makes a new environment, from ``env=`` or the dataset's record.

        It contains none of the data, so it can be sent to another process. Leaves that
        ``load_dataset(concatenate=...)`` joined are joined in its observations too.

        Calling it raises ``DatasetError`` saying what to install, or that none is recorded.
        """
        return self.env or partial(_no_env, self.name)


def _no_env(name: str) -> gym.Env[Any, Any]:
    raise DatasetError(f"{name}: the data records no environment; pass env= to load_dataset.")


@dataclass(frozen=True, repr=False)
class OfflineDataset(DatasetSummary):
    """Transitions that passed every check, with their spaces, statistics and environment.

    The other attributes are those of ``Description``.

    Attributes:
        transitions: batch ``(N,)`` in TorchRL's layout: ``observation`` (nested for Dict spaces),
            ``action``, ``("next", "observation")``, ``("next", "reward")`` (scaled, ``(N, 1)``),
            ``("next", "terminated" | "truncated" | "done")`` bool ``(N, 1)`` (done: terminated or
            truncated), and int64 ``("collector", "traj_ids")`` ``(N,)``, which number the episodes.
            A transition may terminate inside an episode if trajectories continue after a goal.
            ``action_mask``, ``("next", "action_mask")`` bool ``(N, n)`` and ``action_log_prob``
            ``(N,)`` if the source has them. Episodes are complete, consecutive and in the source's
            order.
    """

    transitions: TensorDict

    def __len__(self) -> int:
        return int(self.transitions.batch_size[0])

    @property
    def masked(self) -> bool:
        return "action_mask" in self.transitions

    def range_of(self, key: Key) -> tuple[float, float]:
        values = self.transitions[key].cpu().numpy()
        return float(values.min()), float(values.max())

    def sketch(self) -> NDArray[np.int64]:
        return sketch_of(self.episode_digests())

    def episode_digests(self) -> NDArray[np.int64]:
        """One number for each episode; see ``digests.episode_digests``."""
        return episode_digests(self.transitions, self.episode_returns, self.episode_lengths)

    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.transitions)

    def replay_buffer(
        self, batch_size: int, device: Device = None, seed: int | None = None, **kwargs: Any
    ) -> TensorDictReplayBuffer:
        """A TorchRL buffer of the transitions; ``kwargs`` as for ``data.replay_buffer``."""
        return replay.replay_buffer(
            self.transitions, batch_size, device=device, seed=seed, **kwargs
        )

    def device_sampler(
        self, batch_size: int, device: Device = None, seed: int | None = None
    ) -> replay.DeviceSampler:
        """A ``DeviceSampler`` of the transitions."""
        return replay.DeviceSampler(self.transitions, batch_size, device=device, seed=seed)

    def windows(self, length: int, *, stack: bool = False, jumps: str = "error") -> Windows:
        """The transitions with the last ``length`` observations in place of one.

        See ``data.Windows``: padding, masks, memory, ``stack`` and ``jumps``.
        """
        return Windows(
            self.transitions, self.episode_lengths, length, stack=stack, jumps=jumps, name=self.name
        )

    def frame_stack(self, length: int, *, jumps: str = "error") -> Windows:
        """:meth:`windows` whose frames are stacked into one observation, without masks.

        ``frame_stack(1)`` has the entries of the transitions and holds every observation once.
        """
        return self.windows(length, stack=True, jumps=jumps)

    def chunks(
        self, size: int, *, history: int = 1, stack: bool = False, jumps: str = "error"
    ) -> Chunks:
        """The transitions as steps of ``size`` actions, for ``IQLConfig(action_chunk=size)``.

        See ``data.Chunks``: shapes, ends of episodes, ``history``, ``stack`` and ``jumps``.
        """
        return Chunks(
            self.transitions, self.episode_lengths, size, history=history, stack=stack, jumps=jumps,
            name=self.name,
        )  # fmt: skip

    def flatten_actions(self) -> OfflineDataset:
        """The same data with actions ``(A,)`` in place of a Box of another shape.

        ``make_env`` then takes such actions too. Raises ``DatasetError`` if actions are not a Box.
        """
        space = flat_action_space(self.action_space, self.name)
        transitions = self.transitions.copy()
        transitions["action"] = self.transitions["action"].reshape(len(self), -1)
        env = partial(adapted_env, self.make_env, Adaptation(flat_action=True))
        return replace(self, transitions=transitions, action_space=space, env=env)

    def relabelled(
        self,
        goal: GoalChoice = None,
        *,
        current: float = 0.2,
        future: float = 0.5,
        random: float = 0.3,
        discount: float | None = 0.99,
        actor: GoalOrigins | None = ACTOR_ORIGINS,
        reached: Reached = None,
        rewards: tuple[float, float] = (0.0, -1.0),
        name: str | None = None,
    ) -> RelabelledDataset:
        """The dataset for goal-conditioned policies and values: batches have goals that it reached.

        The goal is one more leaf of a Dict: ``{"observation": ..., "goal": ...}``, or the leaves of a
        Dict and ``"goal"``. The dataset's rewards and terminations are not used: a transition whose
        observation reaches the goal (s_t, not s_t+1, as in OGBench) has ``rewards[0]`` and terminates;
        any other has ``rewards[1]`` and is bootstrapped. Trajectories are the dataset's episodes.

        Args:
            goal: the part of an observation that is its goal. None: all of it; the name of a leaf of
                a Dict (``"arm.place"`` if nested); places of a vector, ``[0, 1]``; or a function of a
                batch of observations (a tensor, or nested dicts of them) that gives floats
                ``(B, *G)``. Of a Dict with ``achieved_goal`` and ``desired_goal`` by default the
                first, which then replaces the second.
            current, future, random, discount: the distribution of the values' goals,
                :class:`~iql_torchrl.data.GoalOrigins`; give the ``discount`` of the config.
            actor: that of the policy's goals, by default uniform over the future as in OGBench. None:
                the values' goals, which saves an evaluation of the target critics and of V.
            reached: None: if all numbers are equal; a number: within that Euclidean distance; or a
                function of two batches of goals that gives bools ``(B,)``.
            rewards: at the goal, and elsewhere; ``(1.0, 0.0)`` is the other usual choice.
            name: of the leaf with the goal; a leaf of that name is replaced.

        A goal has the statistics of the part that it comes from; those of a function are measured.

        Raises ``DatasetError`` on a goal that the observations lack, ``ValueError`` on other settings.
        """
        names = getattr(self.observation_space, "spaces", {})
        if goal is None and {"achieved_goal", "desired_goal"} <= set(names):
            goal, name = "achieved_goal", name or "desired_goal"
        if not callable(reached) and reached is not None and not reached >= 0:
            raise ValueError(f"reached is {reached!r}; expected None, a distance or a function.")
        values = GoalOrigins(current, future, random, discount)
        how = Relabelling(
            space=self.observation_space, goal=goal, name=name or "goal", values=values, actor=actor,
            reached=reached, rewards=(float(rewards[0]), float(rewards[1])),
        )  # fmt: skip
        return RelabelledDataset.of(self, how)

    def split(self, fraction: float, seed: int) -> tuple[OfflineDataset, OfflineDataset]:
        """Two datasets of complete episodes, the first with ``fraction`` of them, drawn at random.

        Both keep this dataset's order, episode numbers, statistics and reward scaling, so that numbers
        from one mean the same in the other. Both are copies in memory. Raises ``DatasetError`` if one
        side would be empty.
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
        kept = torch.from_numpy(np.flatnonzero(np.repeat(episodes, self.episode_lengths)))
        return replace(
            self,
            transitions=self.transitions[kept],
            episode_returns=self.episode_returns[episodes],
            episode_lengths=self.episode_lengths[episodes],
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class RelabelledDataset(DatasetSummary):
    """A dataset whose batches have goals: what ``OfflineDataset.relabelled`` returns.

    ``make_agent``, ``OfflineTrainer`` and populations take it. ``make_env`` gives observations with
    goals: a ``data.GoalEnv``, or the environment of ``dataset`` if that has such a leaf.

    Attributes: ``dataset``, without goals; ``relabelling``, the settings; ``history``, of windows.
    ``episode_returns`` are NaN, because rewards depend on goals.
    """

    dataset: OfflineDataset
    relabelling: Relabelling
    history: History | None = None
    jumps: str = "error"

    @classmethod
    def of(cls, dataset: OfflineDataset, how: Relabelling) -> RelabelledDataset:
        """Raises as ``OfflineDataset.relabelled``."""
        space = how.goal_space(lambda key: dataset.transitions[key][:2])
        whole: Any = dataset.observation_space
        observed = {"observation": whole} if how.wraps else whole.spaces
        old = observed.get(how.name)
        if old is not None and (how.wraps or (old.shape, old.dtype) != (space.shape, space.dtype)):
            raise DatasetError(
                f"{dataset.name}: {how.name!r} is {describe_space(old)} already, and the goals are "
                f"{describe_space(space)}; choose another name=."
            )
        statistics: dict[Any, ObservationStatistics] = {
            ("observation", "observation") if how.wraps else key: each
            for key, each in dataset.statistics.items()
        }
        goal = _goal_statistics(dataset, how, space)
        statistics |= {} if goal is None else {("observation", how.name): goal}
        described = {each.name: getattr(dataset, each.name) for each in fields(DatasetSummary)}
        if old is None and dataset.env is not None:
            described["env"] = partial(_goal_env, dataset.env, how, space)
        described |= {
            "observation_space": gym.spaces.Dict({**observed, how.name: space}),
            "statistics": statistics,
            "episode_returns": np.full(len(dataset.episode_lengths), np.nan),
            "reward_map": RewardMap(),
        }
        return cls(**described, dataset=dataset, relabelling=how)

    @property
    def masked(self) -> bool:
        return self.dataset.masked

    def range_of(self, key: Key) -> tuple[float, float]:
        stored = self.relabelling.source_key(key)
        if stored is not None:
            return self.dataset.range_of(stored)
        low, high = self.relabelling.of(lambda leaf: self.dataset.transitions[leaf]).aminmax()
        return float(low), float(high)

    def sketch(self) -> NDArray[np.int64]:
        return self.dataset.sketch()

    def fingerprint(self) -> dict[str, str]:
        return self.dataset.fingerprint() | {"goals": str(self.relabelling)}

    @property
    def transitions(self) -> NoReturn:
        """Always raises ``DatasetError``, because goals are drawn for batches."""
        raise DatasetError(
            f"{self.name}: its goals are drawn for batches, and this needs all transitions at once. "
            "Use replay_buffer(batch_size), or .dataset for the transitions without goals."
        )

    def chunks(self, size: int, **windows: Any) -> NoReturn:
        """Always raises ``DatasetError``, because a goal may be reached within a chunk."""
        raise DatasetError(
            f"{self.name}: chunks of {size} actions cannot be made of a dataset with goals, which may "
            "be reached within a chunk. Choose action_chunk=1, or the recorded rewards (.dataset)."
        )

    def windows(
        self, length: int, *, stack: bool = False, jumps: str = "error"
    ) -> RelabelledDataset:
        """The same with ``OfflineDataset.windows`` of observations, in which the goal is repeated."""
        return replace(self, history=History(length, stack), jumps=jumps)

    def device_sampler(
        self, batch_size: int, device: Device = None, seed: int | None = None
    ) -> GoalSampler:
        """A ``GoalSampler`` of the transitions; ``replay_buffer`` is the same."""
        source: Any = self.dataset
        if (form := self.history) is not None:
            source = source.windows(form.length, stack=form.stack, jumps=self.jumps)
        sampler = source.device_sampler(batch_size, device, seed)
        return GoalSampler(sampler, self.episode_lengths, self.relabelling, form)

    replay_buffer = device_sampler


def _goal_env(make_env: Any, how: Relabelling, space: gym.Space[Any]) -> gym.Env[Any, Any]:
    return GoalEnv(make_env(), how, space)


def _goal_statistics(
    dataset: OfflineDataset, how: Relabelling, space: gym.Space[Any]
) -> ObservationStatistics | None:
    if callable(how.goal):
        total = StatisticsAccumulator(space.shape or ())
        for some in torch.arange(len(dataset)).split(65_536):
            total.update(how.of(lambda key, some=some: dataset.transitions[key][some]))  # type: ignore[misc]
        return total.result()
    part = dataset.statistics.get("observation" if how.wraps else how.path)
    return None if part is None else part.map(how.pick)
