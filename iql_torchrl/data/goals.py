"""Goals for logs without a task: what was reached later is what was wanted.

Goal-conditioned IQL trains on rows with goals that other rows of the log reached (hindsight, Andrychowicz
et al. 2017, arXiv:1707.01495). Defaults and distributions are those of GCIVL and GCIQL in OGBench (Park et
al. 2025, arXiv:2410.20092; ``impls/utils/datasets.py`` of github.com/seohongpark/ogbench, commit 1d41409).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.data.replay import DeviceSampler, nested_entry
from iql_torchrl.data.schema import DatasetError, Key, dotted, leaf_spaces
from iql_torchrl.descriptions import describe_space
from iql_torchrl.networks import History, stack_frames

__all__ = ["GoalEnv", "GoalOrigins", "GoalSampler", "Relabelling", "last_rows"]

GoalChoice: TypeAlias = str | Sequence[int] | Callable[[Any], Tensor] | None
Reached: TypeAlias = float | Callable[[Tensor, Tensor], Tensor] | None
#: Names of gymnasium-robotics, which ``relabelled`` uses where an observation has both.
ACHIEVED, DESIRED = "achieved_goal", "desired_goal"
#: Below it a batch has the entries that the policy's loss reads in place of those of the same name.
FOR_ACTOR = "for_actor"
RAW = 2**53  # random whole numbers below it are uniform on [0, 1) when divided by it
SUCCESS_KEYS = ("success", "is_success")


@dataclass(frozen=True)
class GoalOrigins:
    """The distribution of the goal of a row t whose trajectory ends at row T.

    The goal is that of row t with probability ``current``, of a row drawn uniformly from the whole log
    with probability ``random``, and with probability ``future`` that of row ``min(t + D, T)`` with
    ``P(D = k) = (1 - discount) discount**(k - 1)``, k >= 1: all that would go past the end is at T. With
    ``discount=None`` it is uniform on t + 1 to T instead. In the last row of a trajectory the future is
    that row itself. The state after row T is no goal, as in OGBench.

    Raises ``ValueError`` on probabilities below 0 or whose sum is not 1, and on a discount outside [0, 1).
    """

    current: float = 0.2
    future: float = 0.5
    random: float = 0.3
    discount: float | None = 0.99

    def __post_init__(self) -> None:
        parts = self.current, self.future, self.random
        if not (min(parts) >= 0 and math.isclose(sum(parts), 1.0, abs_tol=1e-6)):
            raise ValueError(
                f"current, future and random are {', '.join(map(str, parts))}; expected three "
                "probabilities, at least 0, whose sum is 1."
            )
        if self.discount is not None and not 0 <= self.discount < 1:
            raise ValueError(
                f"discount is {self.discount}; expected a number in [0, 1), or None for goals uniform "
                "over the future."
            )

    def rows(self, rows: Tensor, last: Tensor, count: int, raw: Tensor) -> Tensor:
        """Rows of the goals, int64 ``(B,)``.

        ``rows`` ``(B,)`` have their trajectories' ends at ``last`` ``(B,)``, in a log of ``count`` rows;
        ``raw`` ``(2, B)`` are random whole numbers below ``RAW``.
        """
        origin = raw[0].double() / RAW
        if self.discount is None:
            ahead = 1 + raw[1] % (last - rows).clamp(min=1)
        else:
            log = math.log(self.discount) if self.discount else -math.inf
            ahead = 1 + (torch.log1p(-(raw[1].double() / RAW)) / log).long()
        other = torch.where(
            origin < self.current + self.future, torch.minimum(rows + ahead, last), raw[1] % count
        )
        return torch.where(origin < self.current, rows, other)


ACTOR_ORIGINS = GoalOrigins(0.0, 1.0, 0.0, discount=None)


@dataclass(frozen=True, kw_only=True)
class Relabelling:
    """What a goal is, which goals a row gets, and when one is reached; see ``OfflineDataset.relabelled``.

    ``space`` is that of the log's observations.
    """

    space: gym.Space[Any]
    goal: GoalChoice
    name: str
    values: GoalOrigins
    actor: GoalOrigins | None
    reached: Reached
    rewards: tuple[float, float]

    @property
    def plain(self) -> bool:
        """Whether the log's observation is no Dict, so that it becomes one with ``"observation"``."""
        return not isinstance(self.space, spaces.Dict)

    @property
    def path(self) -> Key | None:
        """The leaf of the log that has the goal; None where a function reads all leaves."""
        if callable(self.goal):
            return None
        return ("observation", *self.goal.split(".")) if isinstance(self.goal, str) else ("observation",)

    def pick(self, leaf: Any) -> Any:
        """The goal ``(..., *G)`` of the leaf at ``path``: the leaf, or the named places of a vector."""
        whole = self.goal is None or isinstance(self.goal, str)
        return leaf if whole else leaf[..., list(self.goal)]  # type: ignore[arg-type]

    def of(self, leaf: Callable[[Key], Tensor]) -> Tensor:
        """The goals ``(B, *G)`` of B observations, of which ``leaf(key)`` gives one leaf ``(B, *shape)``."""
        if self.path is not None:
            return self.pick(leaf(self.path))
        assert callable(self.goal)
        observation: dict[str, Any] = {}
        for key in leaf_spaces(self.space):
            nested_entry(observation, key, leaf(key))
        return self.goal(observation["observation"])

    def is_reached(self, achieved: Tensor, goal: Tensor) -> Tensor:
        """Bool ``(B,)``; by default whether all numbers are equal."""
        if callable(self.reached):
            return self.reached(achieved, goal)
        if self.reached is None:
            return (achieved == goal).reshape(len(goal), -1).all(1)
        gap = (achieved.double() - goal.double()).reshape(len(goal), -1)
        return gap.square().sum(1) <= self.reached**2

    def with_goal(self, observation: Any, goal: Any) -> dict[str, Any]:
        """The observation with its goal, as nested dicts."""
        return {**({"observation": observation} if self.plain else observation), self.name: goal}

    def goal_space(self, first: Callable[[Key], Tensor]) -> gym.Space[Any]:
        """The space of the goals; ``first`` gives leaves of some rows, for functions.

        Raises ``DatasetError`` on a goal that the observations do not have.
        """
        leaves = leaf_spaces(self.space)
        if self.path is None:
            given = self.of(first)
            rows = len(first(next(iter(leaves))))
            floats = isinstance(given, Tensor) and given.is_floating_point() and len(given) == rows
            starts = any(np.any(getattr(leaf, "start", 0)) for leaf in leaves.values())
            if not floats or starts:
                found = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else given
                raise DatasetError(
                    f"goal is a function that gives {found} for {rows} observations of "
                    f"{describe_space(self.space)}; expected floats ({rows}, ...), from "
                    "observations whose categories count from 0. Name a leaf where goals are categories."
                )
            return spaces.Box(-np.inf, np.inf, tuple(given.shape[1:]), np.float32)
        leaf = leaves.get(self.path)
        if leaf is None:
            raise DatasetError(
                f"goal is {self.goal!r}, and the observations are {describe_space(self.space)}; expected "
                f"one of {', '.join(repr(dotted(key[1:])) for key in leaves if key[1:]) or 'None'}, places "
                "of a vector such as [0, 1], or a function of a batch of observations."
            )
        if self.goal is None or isinstance(self.goal, str):
            return leaf
        size = leaf.shape[0] if isinstance(leaf, spaces.Box) and len(leaf.shape) == 1 else 0
        places = [int(place) for place in self.goal]  # type: ignore[union-attr]
        if not places or not all(0 <= place < size for place in places):
            raise DatasetError(
                f"goal is {self.goal!r}, and the observations are {describe_space(leaf)}; expected "
                f"places from 0 to {size - 1} of a vector."
                if size
                else f"goal is {self.goal!r}, places of a vector, and the observations are "
                f"{describe_space(leaf)}; name a leaf, or pass a function."
            )
        assert isinstance(leaf, spaces.Box)
        return spaces.Box(leaf.low[places], leaf.high[places], dtype=leaf.dtype.type)

    def __str__(self) -> str:
        """The settings in words that are equal in every process; of functions the names."""
        names = [
            getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else str(value)
            for value in (self.goal, self.reached)
        ]
        return f"{self.name} from {names[0]}, {self.values}, {self.actor}, {names[1]}, {self.rewards}"


def last_rows(lengths: NDArray[np.int64]) -> Tensor:
    """The last row of each row's trajectory, int64 ``(N,)``, from the trajectories' lengths."""
    return torch.from_numpy(np.repeat(np.cumsum(lengths) - 1, lengths))


class GoalSampler(DeviceSampler):
    """Rows of the sampler ``rows`` with goals that are drawn anew for every batch.

    A batch is one of ``rows`` whose observations, on both sides of ``next``, have the goal as one more
    leaf, and whose ``reward``, ``terminated`` and ``done`` are those of the goal. With
    ``relabelling.actor`` it has a second goal for each row, for the policy's loss, below ``"for_actor"``.

    Rows are drawn on the device. ``gather`` makes goals of ``indices``, so that a batch is a function of
    these, and a compiled program may contain it: functions in ``relabelling`` must be traceable.
    Nothing is stored twice: goals are gathered from the observations.

    Args:
        rows: its generator is used; a ``WindowSampler`` gives windows, in which the goal is repeated.
        last: the last row of each row's trajectory, ``(N,)``: :func:`last_rows`.
        history: the form of the windows.
    """

    def __init__(
        self, rows: DeviceSampler, last: Tensor, relabelling: Relabelling, history: History | None
    ) -> None:
        self.__dict__.update(vars(rows))
        self.source, self.relabelling, self.history = rows, relabelling, history
        self.last = last.to(self.device)
        self.tables = [*rows.tables, self.last]
        self.origins = [o for o in (relabelling.values, relabelling.actor) if o is not None]

    def index_shape(self, batch_size: int) -> tuple[int, ...]:
        return 1 + 2 * len(self.origins), batch_size

    def draw(self, out: Tensor) -> Tensor:
        super().draw(out[0])
        torch.randint(RAW, out[1:].shape, generator=self.generator, out=out[1:])
        return out

    def indices(self, batch_size: int | None = None) -> Tensor:
        """Row numbers of a batch, and below them the random numbers that choose their goals."""
        size = self.batch_size if batch_size is None else batch_size
        shape = self.index_shape(size)
        return self.draw(torch.empty(shape, dtype=torch.int64, device=self.device))

    def goal_rows(self, indices: Tensor) -> list[Tensor]:
        """The rows ``(B,)`` of the goals that ``gather(indices)`` has: of the values, of the policy."""
        rows, raw = indices[0], indices[1:]
        last = self.last.index_select(0, rows)
        return [
            origin.rows(rows, last, self.rows, raw[2 * n : 2 * n + 2])
            for n, origin in enumerate(self.origins)
        ]

    def gather(self, indices: Tensor) -> TensorDict:
        size = [indices.shape[1]]
        return TensorDict(self.entries(indices), batch_size=size, device=self.device)

    def entries(self, indices: Tensor) -> dict[str, Any]:
        how, rows = self.relabelling, indices[0]
        nested = self.source.entries(rows)
        achieved, *goals = (self._goals(each) for each in (rows, *self.goal_rows(indices)))
        reached = how.is_reached(achieved, goals[0]).unsqueeze(1)
        after, (at_goal, elsewhere) = nested["next"], how.rewards
        after["reward"] = torch.full_like(after["reward"], elsewhere).masked_fill(reached, at_goal)
        after["terminated"], after["done"] = reached, reached | after["truncated"]
        windows = [self._windows(goal) for goal in goals]
        for side in (nested, after):
            side["observation"] = how.with_goal(side["observation"], windows[0])
        for own in windows[1:]:
            replaced = {"observation": {how.name: own}}
            nested[FOR_ACTOR] = {**replaced, "next": replaced}
        return nested

    def _goals(self, rows: Tensor) -> Tensor:
        """The goals ``(B, *G)`` that the rows numbered ``(B,)`` reach."""
        return self.relabelling.of(lambda key: self._stored(key).index_select(0, rows))

    def _stored(self, key: Key) -> Tensor:
        column = self.source.column(key)
        assert column is not None
        return column

    def _windows(self, goal: Tensor) -> Tensor:
        if self.history is None:
            return goal
        frames = goal.unsqueeze(1).expand(-1, self.history.length, *goal.shape[1:])
        return stack_frames(frames, goal.ndim - 1) if self.history.stack else frames

    def column(self, key: Key) -> Tensor | None:
        """As for the sampler of the rows; of a goal all that can be drawn, None with a function."""
        name, how = (key,) if isinstance(key, str) else tuple(key), self.relabelling
        side, inside = (name[:1], name[1:]) if name[0] == "next" else ((), name)
        if inside == ("observation", how.name):
            return None if how.path is None else how.pick(self._stored(how.path))
        if how.plain and inside[:1] == ("observation",):
            inside = ("observation", *inside[2:])
        return self.source.column((*side, *inside))


class GoalEnv(gym.Wrapper[Any, Any, Any, Any]):
    """``env`` with a goal in each observation, as the batches of a relabelled dataset have it.

    ``reset(options={"goal": goal})`` gives the goal, in the form in which the environment's observations
    have it; other options are the environment's. Without, it is that of the observation in the
    environment's ``info["goal"]`` (as OGBench reports it).

    ``info["success"]``: the environment's own where it reports one, else whether the goal is reached. A
    success ends the episode. Rewards are those of the relabelling.

    Raises ``ValueError`` on a goal of another shape, and where there is none.
    """

    def __init__(
        self, env: gym.Env[Any, Any], relabelling: Relabelling, goal_space: gym.Space[Any]
    ) -> None:
        super().__init__(env)
        self.relabelling, self._space = relabelling, goal_space
        parts = relabelling.with_goal(
            env.observation_space if relabelling.plain else env.observation_space.spaces,  # type: ignore[attr-defined]
            goal_space,
        )
        self.observation_space = spaces.Dict(parts)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        rest = dict(options or {})
        goal = rest.pop("goal", None)
        observation, info = self.env.reset(seed=seed, options=rest or None)
        if goal is None and "goal" not in info:
            raise ValueError(
                "the environment was reset without a goal: pass options={'goal': goal} to reset, or "
                "goals=[{'goal': goal}, ...] to evaluate."
            )
        goal = np.asarray(self._goal_of(info["goal"]) if goal is None else goal, self._space.dtype)
        if goal.shape != self._space.shape:
            raise ValueError(
                f"the goal has shape {goal.shape}; expected one of {describe_space(self._space)}."
            )
        self.goal = goal
        return self.relabelling.with_goal(observation, goal), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = self.env.step(action)
        own = [info[key] for key in SUCCESS_KEYS if key in info]
        if own:
            success = bool(np.asarray(own[0]).item())
        else:
            pair = (torch.as_tensor(each)[None] for each in (self._goal_of(observation), self.goal))
            success = bool(self.relabelling.is_reached(*pair))
        reward = self.relabelling.rewards[0 if success else 1]
        observation = self.relabelling.with_goal(observation, self.goal)
        return observation, reward, terminated or success, truncated, {**info, "success": success}

    def _goal_of(self, observation: Any) -> NDArray[Any]:
        """What the observation of the environment reaches, in the dtype of goals."""

        def leaf(key: Key) -> Tensor:
            value = observation
            for name in key[1:]:
                value = value[name]
            values = torch.as_tensor(np.asarray(value))[None]
            return values.float() if values.is_floating_point() else values

        return self.relabelling.of(leaf)[0].numpy().astype(self._space.dtype)
