"""Goals for datasets without a task: what was reached later is what was wanted.

Transitions get goals that the dataset reaches (hindsight, Andrychowicz et al. 2017,
arXiv:1707.01495). Defaults are those of GCIVL and GCIQL in OGBench (Park et al. 2025, arXiv:2410.20092;
``impls/utils/datasets.py`` of github.com/seohongpark/ogbench, commit 1d41409).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl.data.codec import leaf_spaces
from iql_torchrl.data.replay import DeviceSampler
from iql_torchrl.data.schema import DONE, REWARD, TERMINATED, TRUNCATED, DatasetError, Key, nested
from iql_torchrl.descriptions import describe_space
from iql_torchrl.networks import History, stack_frames

GoalChoice: TypeAlias = str | Sequence[int] | Callable[[Any], Tensor] | None
Reached: TypeAlias = float | Callable[[Tensor, Tensor], Tensor] | None
#: Below this key a batch has the entries that the policy's loss reads in place of the others.
FOR_ACTOR = "for_actor"
RAW = 2**53  # integers below it, divided by it, are uniform on [0, 1) in float64


@dataclass(frozen=True)
class GoalOrigins:
    """Distribution of the goal of a transition t whose episode has its last transition at T.

    The goal is what t observes with probability ``current``; what a transition drawn uniformly from the
    dataset observes with probability ``random``; and with probability ``future`` what ``min(t + D, T)``
    observes, with ``P(D = k) = (1 - discount) discount**(k - 1)``, k >= 1 (so T has all the mass beyond
    it). With ``discount=None`` the future is uniform on t + 1 to T. The future of T is T itself. The
    next observation of T is never a goal, as in OGBench.

    Raises ``ValueError`` unless the three are probabilities with sum 1 and the discount is in [0, 1).
    """

    current: float = 0.2
    future: float = 0.5
    random: float = 0.3
    discount: float | None = 0.99

    def __post_init__(self) -> None:
        parts = self.current, self.future, self.random
        if not (min(parts) >= 0 and math.isclose(sum(parts), 1.0, abs_tol=1e-6)):
            raise ValueError(
                f"current, future and random are {parts}; expected probabilities whose sum is 1."
            )
        if self.discount is not None and not 0 <= self.discount < 1:
            raise ValueError(f"discount is {self.discount}; expected None or a number in [0, 1).")

    def choose(self, numbers: Tensor, last: Tensor, count: int, raw: Tensor) -> Tensor:
        """The transitions ``(B,)`` of which ``numbers``, in episodes with ends ``last``, get the goals.

        ``count``: transitions of the dataset. ``raw``: int64 ``(2, B)``, random numbers below ``RAW``.
        """
        origin = raw[0].double() / RAW
        if self.discount is None:
            ahead = 1 + raw[1] % (last - numbers).clamp(min=1)
        else:
            log = math.log(self.discount) if self.discount else -math.inf
            ahead = 1 + (torch.log1p(-(raw[1].double() / RAW)) / log).long()
        future = torch.minimum(numbers + ahead, last)
        other = torch.where(origin < self.current + self.future, future, raw[1] % count)
        return torch.where(origin < self.current, numbers, other)


ACTOR_ORIGINS = GoalOrigins(0.0, 1.0, 0.0, discount=None)


@dataclass(frozen=True, kw_only=True)
class Relabelling:
    """The settings of ``OfflineDataset.relabelled``; ``space`` is that of its observations."""

    space: gym.Space[Any]
    goal: GoalChoice
    name: str
    values: GoalOrigins
    actor: GoalOrigins | None
    reached: Reached
    rewards: tuple[float, float]

    @property
    def wraps(self) -> bool:
        """True if the dataset's observations are not a Dict: they become ``"observation"`` of one."""
        return not isinstance(self.space, spaces.Dict)

    @property
    def path(self) -> Key:
        """The leaf of the dataset that has the goal, unless a function reads all leaves."""
        return ("observation", *(self.goal.split(".") if isinstance(self.goal, str) else ()))

    def source_key(self, key: Key) -> Key | None:
        """The dataset's key of an entry of a batch; None for the goal."""
        side, inside = (key[:1], key[1:]) if key[0] == "next" else ((), key)
        if inside == ("observation", self.name):
            return None
        if self.wraps and inside == ("observation", "observation"):
            inside = inside[:1]
        return (*side, *inside)

    def pick(self, leaf: Any) -> Any:
        """The goal ``(..., *G)`` of the leaf at ``path``: the leaf, or its chosen places."""
        whole = self.goal is None or isinstance(self.goal, str)
        return leaf if whole else leaf[..., list(self.goal)]  # type: ignore[arg-type]

    def of(self, leaf: Callable[[Key], Tensor]) -> Tensor:
        """The goals ``(B, *G)`` that B observations reach; ``leaf(key)`` is one leaf of them."""
        if not callable(self.goal):
            picked: Tensor = self.pick(leaf(self.path))
            return picked
        leaves = nested({key: leaf(key) for key in leaf_spaces(self.space)})
        return self.goal(leaves["observation"])

    def is_reached(self, achieved: Tensor, goal: Tensor) -> Tensor:
        """Compare the goals that observations reach with those that are wanted: bool ``(B,)``."""
        if callable(self.reached):
            return self.reached(achieved, goal)
        if self.reached is None:
            return (achieved == goal).reshape(len(goal), -1).all(1)
        gap = (achieved.double() - goal.double()).reshape(len(goal), -1)
        return gap.square().sum(1) <= self.reached**2

    def with_goal(self, observation: Any, goal: Any) -> dict[str, Any]:
        return {**({"observation": observation} if self.wraps else observation), self.name: goal}

    def goal_space(self, leaf_of: Callable[[Key], Tensor]) -> gym.Space[Any]:
        """The space of the goals; a function's from some observations. Raises ``DatasetError``."""
        leaves = leaf_spaces(self.space)
        if callable(self.goal):
            given = self.of(leaf_of)
            if given.is_floating_point() and len(given) == len(leaf_of(next(iter(leaves)))):
                return spaces.Box(-np.inf, np.inf, tuple(given.shape[1:]), np.float32)
            raise DatasetError(
                f"goal is a function that gives {given.dtype} {tuple(given.shape)}; expected floats "
                "(B, ...) for B observations. Name the leaf if goals are categories or images."
            )
        leaf = leaves.get(self.path)
        if self.goal is None or isinstance(self.goal, str):
            if leaf is not None:
                return leaf
        elif (
            isinstance(leaf, spaces.Box) and len(leaf.shape) == 1 and hasattr(self.goal, "__iter__")
        ):
            inside = [0 <= place < leaf.shape[0] for place in self.goal]
            if inside and all(inside):
                low, high = self.pick(leaf.low), self.pick(leaf.high)
                return spaces.Box(low, high, dtype=leaf.dtype.type)
        raise DatasetError(
            f"goal is {self.goal!r}, and the observations are {describe_space(self.space)}; expected "
            "the name of a leaf of a Dict, places of a vector such as [0, 1], or a function."
        )

    def __str__(self) -> str:
        """The settings, equal in every process; of functions the names."""
        goal, reached = (getattr(x, "__qualname__", str(x)) for x in (self.goal, self.reached))
        return f"{self.name} of {goal}, {self.values}, {self.actor}, {reached}, {self.rewards}"


class GoalSampler(DeviceSampler):
    """Transitions of the sampler ``source`` with goals that are drawn for each batch.

    Observations on both sides of ``next`` have the goal as one more leaf; ``reward``, ``terminated``
    and ``done`` are those of the goal. With ``relabelling.actor`` each transition has a second goal,
    for the policy's loss, below ``"for_actor"``. Goals are gathered from the stored observations.

    ``indices`` has the numbers of the transitions and random numbers that choose their goals;
    ``gather`` is a function of these, which can be compiled if functions in ``relabelling`` can.

    Args:
        source: its generator is used; with a ``WindowSampler``, of windows ``history``, the goal is
            repeated in each window.
        lengths: transitions of each episode, ``(E,)``.
    """

    def __init__(
        self, source: DeviceSampler, lengths: NDArray[np.int64], relabelling: Relabelling,
        history: History | None = None,
    ) -> None:  # fmt: skip
        self.__dict__.update(vars(source))
        self.source, self.relabelling, self.history = source, relabelling, history
        self.last = torch.from_numpy(np.repeat(np.cumsum(lengths) - 1, lengths)).to(self.device)
        self.tables = [*source.tables, self.last]
        self.origins = [o for o in (relabelling.values, relabelling.actor) if o is not None]

    def index_shape(self, batch_size: int) -> tuple[int, ...]:
        return 1 + 2 * len(self.origins), batch_size

    def draw(self, out: Tensor) -> Tensor:
        super().draw(out[0])
        torch.randint(RAW, out[1:].shape, generator=self.generator, out=out[1:])
        return out

    def goal_rows(self, indices: Tensor) -> list[Tensor]:
        """The transitions ``(B,)`` whose goals ``gather(indices)`` has: for values, for the policy."""
        last, raw = self.last.index_select(0, indices[0]), indices[1:].split(2)
        chosen = zip(self.origins, raw, strict=True)
        return [origin.choose(indices[0], last, self.rows, part) for origin, part in chosen]

    def entries(self, indices: Tensor) -> dict[Key, Tensor]:
        how, entries = self.relabelling, self.source.entries(indices[0])
        chosen = [indices[0], *self.goal_rows(indices)]
        achieved, *goals = (how.of(partial(self._leaf, numbers=each)) for each in chosen)
        reached, (at_goal, elsewhere) = how.is_reached(achieved, goals[0]).unsqueeze(1), how.rewards
        reward = torch.full_like(entries[REWARD], elsewhere).masked_fill(reached, at_goal)
        entries |= {REWARD: reward, TERMINATED: reached, DONE: reached | entries[TRUNCATED]}
        of_values, *of_actor = map(self._windows, goals)
        sides: tuple[Key, ...] = ("observation",), ("next", "observation")
        for side in sides:
            if how.wraps:
                entries[(*side, "observation")] = entries.pop(side)
            entries[(*side, how.name)] = of_values
            for goal in of_actor:
                entries[(FOR_ACTOR, *side, how.name)] = goal
        return entries

    def _leaf(self, key: Key, numbers: Tensor | None = None) -> Tensor:
        column = self.source.column(key)
        assert column is not None
        return column if numbers is None else column.index_select(0, numbers)

    def _windows(self, goal: Tensor) -> Tensor:
        if self.history is None:
            return goal
        frames = goal.unsqueeze(1).expand(-1, self.history.length, *goal.shape[1:])
        return stack_frames(frames, goal.ndim - 1) if self.history.stack else frames

    def column(self, key: Key) -> Tensor | None:
        """As for ``source``; of a goal all that may be drawn, None with a function."""
        how = self.relabelling
        stored = how.source_key((key,) if isinstance(key, str) else tuple(key))
        if stored is not None:
            return self.source.column(stored)
        return None if callable(how.goal) else how.pick(self._leaf(how.path))


class GoalEnv(gym.Wrapper[Any, Any, Any, Any]):
    """``env`` with a goal in each observation, as in the batches of a relabelled dataset.

    The goal is ``reset(options={"goal": goal})``, in the form in which the environment observes it;
    else what the observation ``info["goal"]`` of its reset reaches, as in OGBench. The environment
    gets other options. Success is its ``info["success"]`` or ``info["is_success"]``; without these an
    episode succeeds when the goal is reached. Success ends the episode. Rewards are the relabelling's.

    Raises ``ValueError`` without a goal, and on a goal of another shape.
    """

    def __init__(
        self, env: gym.Env[Any, Any], relabelling: Relabelling, goal_space: gym.Space[Any]
    ) -> None:
        super().__init__(env)
        self.relabelling, self._space = relabelling, goal_space
        space: Any = env.observation_space
        parts = relabelling.with_goal(space if relabelling.wraps else space.spaces, goal_space)
        self.observation_space = spaces.Dict(parts)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        rest = dict(options or {})
        goal = rest.pop("goal", None)
        observation, info = self.env.reset(seed=seed, options=rest or None)
        if goal is None and "goal" in info:
            goal = self._achieved(info["goal"])
        if goal is None or np.shape(goal) != self._space.shape:
            raise ValueError(
                f"the goal is {goal!r}; expected one of {describe_space(self._space)}: pass "
                "options={'goal': goal} to reset, or goals=[{'goal': goal}, ...] to evaluate."
            )
        self.goal = np.asarray(goal, self._space.dtype)
        return self.relabelling.with_goal(observation, self.goal), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = self.env.step(action)
        success = info.get("success", info.get("is_success"))
        if success is None:
            pair = self._achieved(observation), self.goal
            success = self.relabelling.is_reached(*(torch.as_tensor(each)[None] for each in pair))
        success = bool(np.asarray(success).item())
        reward = self.relabelling.rewards[0 if success else 1]
        observation = self.relabelling.with_goal(observation, self.goal)
        return observation, reward, terminated or success, truncated, {**info, "success": success}

    def _achieved(self, observation: Any) -> NDArray[Any]:
        """The goal that an observation of the environment reaches."""

        def leaf(key: Key) -> Tensor:
            value = observation
            for name in key[1:]:
                value = value[name]
            return torch.as_tensor(np.asarray(value))[None]

        return self.relabelling.of(leaf)[0].numpy().astype(self._space.dtype)
