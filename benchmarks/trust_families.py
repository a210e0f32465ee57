"""Small problems with exact values, difficult and easy ones, for rankings from datasets alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from iql_torchrl import OfflineDataset, load_dataset

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import ProbabilisticActor

FloatArray = NDArray[np.float64]
Noise = Callable[[NDArray[np.int64], NDArray[np.int64], np.random.Generator], FloatArray]
Cut = Callable[[NDArray[np.int64], NDArray[np.int64], np.random.Generator], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A finite MDP, the policy that makes its dataset, and the policies to choose from.

    ``transition`` ``(S, A, S)``; ``reward`` and ``ending`` (probability that a step terminates)
    ``(S, A)``; ``start`` ``(S,)``; ``behaviour`` and each of ``candidates`` ``(S, A)``; ``noise`` is
    added to rewards, ``cut`` decides which steps are truncated, both of (state, action) and for
    ``cut`` the following state. ``easy``: a good ranking recommends a candidate here.
    """

    transition: FloatArray
    reward: FloatArray
    ending: FloatArray
    start: FloatArray
    behaviour: FloatArray
    candidates: Mapping[str, FloatArray]
    discount: float = 0.95
    episodes: int = 300
    noise: Noise | None = None
    cut: Cut | None = None
    horizon: int = 500
    easy: bool = False

    def value(self, policy: FloatArray) -> float:
        """Exact discounted return of ``policy``, by a linear solve."""
        going = (policy * (1 - self.ending))[:, :, None] * self.transition
        step = np.eye(len(policy)) - self.discount * going.sum(1)
        return float(self.start @ np.linalg.solve(step, (policy * self.reward).sum(1)))

    def rows(self, seed: int) -> dict[str, NDArray]:
        """Logged episodes of the behaviour policy, one after another, as columns."""
        draw = np.random.default_rng(seed)
        count, actions = self.episodes, self.reward.shape[1]
        state = draw.choice(len(self.start), p=self.start, size=count)
        chosen, reached = self.behaviour.cumsum(1), self.transition.cumsum(2)
        alive, parts = np.arange(count), []
        for step in range(self.horizon):
            now = state[alive]
            action = (draw.random(len(alive))[:, None] > chosen[now]).sum(1).clip(max=actions - 1)
            after = (draw.random(len(alive))[:, None] > reached[now, action]).sum(1)
            after = after.clip(max=len(self.start) - 1)
            reward = self.reward[now, action]
            if self.noise is not None:
                reward = reward + self.noise(now, action, draw)
            terminated = draw.random(len(alive)) < self.ending[now, action]
            cut = np.full(len(alive), step == self.horizon - 1)
            if self.cut is not None:
                cut |= self.cut(action, after, draw)
            probability = np.log(self.behaviour[now, action]).astype(np.float32)
            reward, cut = reward.astype(np.float32), cut & ~terminated
            parts.append((alive, now, action, reward, after, terminated, cut, probability))
            state[alive] = after
            alive = alive[~(terminated | cut)]
            if not len(alive):
                break
        names = ("episode", "observation", "action", "reward", "next_observation", "terminated",
                 "truncated", "action_log_prob")  # fmt: skip
        columns = dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))
        order = np.argsort(columns.pop("episode"), kind="stable")
        return {name: column[order] for name, column in columns.items()}

    def dataset(self, seed: int) -> OfflineDataset:
        """:meth:`rows` as a dataset whose spaces are those of the problem, not of the sample."""
        states, actions = self.reward.shape
        return load_dataset(
            self.rows(seed),
            observation_space=spaces.Discrete(states),
            action_space=spaces.Discrete(actions),
            progress=False,
        )

    def actors(self) -> dict[str, ProbabilisticActor]:
        return {name: table_actor(table) for name, table in self.candidates.items()}


class Lookup(nn.Module):
    """Logits of a table of probabilities."""

    def __init__(self, probabilities: FloatArray) -> None:
        super().__init__()
        self.register_buffer("logits", torch.as_tensor(probabilities).clamp(min=0).log())

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.logits[observation]


def table_actor(probabilities: FloatArray) -> ProbabilisticActor:
    """The policy ``(S, A)`` as a TorchRL actor."""
    net = TensorDictModule(Lookup(probabilities), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(
        net,
        in_keys=["logits"],
        spec=Categorical(probabilities.shape[1]),
        distribution_class=torch.distributions.Categorical,
        distribution_kwargs={"validate_args": False},
    )


def always(*actions: int, count: int) -> FloatArray:
    """The policy that takes the given action in each state."""
    return np.eye(count)[list(actions)]


def gaussian(scale: float) -> Noise:
    return lambda state, action, draw: scale * draw.standard_normal(len(state))


def bandit(
    means: list[float], behaviour: list[float], noise: Noise, episodes: int, **more: bool
) -> Problem:
    """One state, one step; the candidates are a BC baseline and each arm."""
    count = len(means)
    candidates = {"clone": np.array([behaviour])}
    candidates |= {f"arm {arm}": always(arm, count=count) for arm in range(count)}
    one = np.ones((1, count))
    return Problem(
        transition=np.ones((1, count, 1)), reward=np.array([means]), ending=one,
        start=np.ones(1), behaviour=np.array([behaviour]), candidates=candidates, discount=1.0,
        episodes=episodes, noise=noise, **more,
    )  # fmt: skip


def chain(*, right: float = 0.6, states: int = 6, slip: float = 0.1) -> Problem:
    """A walk from the left end to a goal of +10 at the right end; each step costs 0.1."""
    transition = np.zeros((states, 2, states))
    for state in range(states):
        for action, step in ((1, 1), (0, -1)):
            for target, chance in ((step, 1 - slip), (-step, slip)):
                transition[state, action, np.clip(state + target, 0, states - 1)] += chance
    reward, ending = np.full((states, 2), -0.1), np.zeros((states, 2))
    reward[-1], ending[-1] = 10.0, 1.0

    def walk(probability: float) -> FloatArray:
        return np.tile([1 - probability, probability], (states, 1))

    candidates = {"clone": walk(right), "right": walk(1.0), "left": walk(0.0)}
    candidates |= {"mostly right": walk(0.8), "mostly left": walk(0.3)}
    return Problem(
        transition=transition, reward=reward, ending=ending, start=np.eye(states)[0],
        behaviour=walk(right), candidates=candidates, noise=gaussian(0.2), easy=True,
    )  # fmt: skip


def random_mdp(seed: int, *, noise: float = 0.5, states: int = 8, actions: int = 3) -> Problem:
    """A random MDP; the candidates are trained on a dataset of their own (:func:`trained`)."""
    draw = np.random.default_rng(10_000 + seed)
    problem = Problem(
        transition=draw.dirichlet(np.full(states, 0.4), (states, actions)),
        reward=draw.normal(size=(states, actions)),
        ending=np.full((states, actions), 0.12),
        start=np.full(states, 1 / states),
        behaviour=draw.dirichlet(np.full(actions, 2.0), states),
        candidates={},
        noise=gaussian(noise),
        easy=True,
    )
    return replace(problem, candidates=trained(problem, 20_000 + seed))


def trained(problem: Problem, seed: int) -> dict[str, FloatArray]:
    """Policies learned from a third dataset: its clone, and it reweighted by exp(beta * advantage)."""
    rows, (states, actions) = problem.rows(seed), problem.reward.shape
    pair = rows["observation"] * actions + rows["action"]
    count = np.bincount(pair, minlength=states * actions)
    each = np.maximum(count, 1)
    reward = (np.bincount(pair, rows["reward"], states * actions) / each).reshape(states, actions)
    following = np.zeros((states * actions, states))
    going = ~rows["terminated"]
    np.add.at(following, (pair[going], rows["next_observation"][going]), 1)
    following = (following / each[:, None]).reshape(states, actions, states)
    seen = count.reshape(states, actions)
    clone = seen + 0.1 / actions
    clone = clone / clone.sum(1, keepdims=True)
    result = {"clone": clone}
    for beta in (0.5, 2.0, 8.0, np.inf):
        policy = clone
        for _ in range(40):
            step = np.eye(states) - problem.discount * np.einsum("sa,sat->st", policy, following)
            value = np.linalg.solve(step + 1e-6 * np.eye(states), (policy * reward).sum(1))
            action_value = reward + problem.discount * following @ value
            advantage = (action_value - value[:, None]) / max(float(np.abs(value).mean()), 0.1)
            if beta == np.inf:
                policy = np.eye(actions)[np.where(seen > 0, action_value, -np.inf).argmax(1)]
                continue
            policy = clone * np.exp(np.clip(beta * advantage, -30, 30))
            policy = policy / policy.sum(1, keepdims=True)
        result["greedy" if beta == np.inf else f"beta {beta:g}"] = policy
    return result


def rare_state(_: int) -> Problem:
    """A rare action leads to a state in which an unlogged action has reward -30."""
    transition = np.zeros((2, 2, 2))
    transition[:, :, 1] = 1
    behaviour = np.array([[0.85, 0.15], [1.0, 0.0]])
    return Problem(
        transition=transition, reward=np.array([[0.0, 1.0], [0.0, -30.0]]),
        ending=np.array([[1.0, 0.0], [1.0, 1.0]]), start=np.array([1.0, 0.0]), behaviour=behaviour,
        candidates={"clone": behaviour, "always 1": always(1, 1, count=2),
                 "1, then 0": always(1, 0, count=2), "uniform": np.full((2, 2), 0.5)},
        discount=0.99, noise=lambda s, a, draw: 3.0 * (s == 0) * draw.standard_normal(len(s)),
    )  # fmt: skip


def rarer_state(_: int) -> Problem:
    """A state that 3 % of the episodes reach; an unlogged action there has reward -200."""
    transition = np.zeros((2, 2, 2))
    transition[:, :, 1] = 1
    behaviour = np.array([[0.5, 0.5], [1.0, 0.0]])
    return Problem(
        transition=transition, reward=np.array([[0.0, 0.5], [0.0, -200.0]]),
        ending=np.array([[0.97, 0.97], [1.0, 1.0]]), start=np.array([1.0, 0.0]),
        behaviour=behaviour, discount=0.99, noise=gaussian(1.0),
        candidates={"clone": behaviour, "reckless": always(1, 1, count=2),
                 "careful": always(1, 0, count=2)},
    )  # fmt: skip


def censored(_: int) -> Problem:
    """Episodes are truncated where an action leads to a bad state that the dataset lacks."""
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 2] = transition[0, 1, 1] = 1
    transition[1, :, 1] = transition[2, :, 2] = 1
    behaviour = np.array([[0.4, 0.6], [0.5, 0.5], [0.5, 0.5]])
    return Problem(
        transition=transition, reward=np.array([[0.0, 1.0], [-15.0, -15.0], [0.5, 0.5]]),
        ending=np.array([[0.0, 0.0], [0.3, 0.3], [1.0, 1.0]]), start=np.array([1.0, 0.0, 0.0]),
        behaviour=behaviour, noise=gaussian(0.3), cut=lambda action, after, draw: after == 1,
        candidates={"clone": behaviour, "into it": always(1, 0, 0, count=2),
                 "more of it": np.array([[0.2, 0.8], [0.5, 0.5], [0.5, 0.5]])},
    )  # fmt: skip


def skewed_losses(_: int) -> Problem:
    """Arms with mostly small rewards and sometimes large losses (lognormal)."""

    def noise(state: NDArray, action: NDArray, draw: np.random.Generator) -> FloatArray:
        loss = np.exp(1.5 * draw.standard_normal(len(state))) - np.exp(1.125)
        return np.where(action == 0, 0.0, -loss)

    return bandit([1.0, 0.6, 0.6, 0.6], [0.55, 0.15, 0.15, 0.15], noise, 200)


def lottery(_: int) -> Problem:
    """Arms with reward 2, and a loss of 100 once in 25 times; the safe arm has reward 1."""

    def noise(state: NDArray, action: NDArray, draw: np.random.Generator) -> FloatArray:
        lost = np.where(draw.random(len(state)) < 0.04, -100.0, 0.0)
        return np.where(action == 0, 0.1 * draw.standard_normal(len(state)), lost + 4.0)

    return bandit([1.0, -2.0, -2.0, -2.0], [0.4, 0.2, 0.2, 0.2], noise, 100)


def poor_clone(_: int) -> Problem:
    """The dataset's episodes are long; cloning is poor, and episodes are truncated."""
    transition = np.zeros((2, 2, 2))
    transition[0, 1, 0] = transition[0, 0, 1] = 1
    transition[1, :, 1] = 1
    rest = [0.5, 0.5]
    return Problem(
        transition=transition, reward=np.array([[1.0, 1.0], [0.6, 0.6]]), ending=np.zeros((2, 2)),
        start=np.array([1.0, 0.0]), behaviour=np.array([[0.02, 0.98], rest]), discount=0.99,
        candidates={"clone": np.array([[0.2, 0.8], rest]),
                    "better than it": np.array([[0.1, 0.9], rest]),
                    "near the behaviour": np.array([[0.05, 0.95], rest])},
        noise=gaussian(0.3), horizon=20, episodes=200,
    )  # fmt: skip


def noisy_mdp(seed: int) -> Problem:
    """A random MDP, much noise, 25 episodes for the fit and 25 held out."""
    problem = replace(random_mdp(seed, noise=2.0), episodes=25, easy=False)
    return replace(problem, candidates=trained(problem, 20_000 + seed))


def good_dataset(seed: int) -> Problem:
    """A random MDP, logged by a nearly optimal policy; all candidates are worse."""
    problem = random_mdp(seed)
    best = 0.9 * problem.candidates["greedy"] + 0.1 / 3
    draw = np.random.default_rng(30_000 + seed)
    candidates = {"clone": best}
    candidates |= {
        f"random {i}": 0.5 * best + 0.5 * draw.dirichlet(np.full(3, 0.5), 8) for i in range(6)
    }
    return replace(problem, behaviour=best, candidates=candidates, easy=False)


WITHOUT_RIGHT = ("clone", "left", "mostly left", "mostly right")
FAMILIES: dict[str, Callable[[int], Problem]] = {
    "rare state": rare_state,
    "rarer state": rarer_state,
    "censored": censored,
    # A safe arm of +1 and three of mean -1 with a standard deviation of 30.
    "winner's curse": lambda _: bandit(
        [1.0, -1.0, -1.0, -1.0], [0.7, 0.1, 0.1, 0.1],
        lambda s, a, draw: 30.0 * (a > 0) * draw.standard_normal(len(s)), 200,
    ),
    # Twenty arms, one of them better than the dataset.
    "many arms": lambda _: bandit([1.0] + [-0.5] * 19, [0.43] + [0.03] * 19, gaussian(5.0), 300),
    # Rewards with Student's t noise of 2.1 degrees of freedom.
    "heavy tails": lambda _: bandit(
        [1.0, 0.5, 0.5, 0.5], [0.55, 0.15, 0.15, 0.15],
        lambda s, a, draw: 4.0 * draw.standard_t(2.1, len(s)), 300,
    ),
    "skewed losses": skewed_losses,
    "lottery": lottery,
    "poor clone": poor_clone,
    # The chain, cut after eight steps, so most of a value lies beyond the dataset.
    "time limit": lambda _: replace(chain(), horizon=8, easy=False),
    # The chain, cut more often after steps to the right.
    "confounded time limit": lambda _: replace(
        chain(), easy=False,
        cut=lambda action, after, draw: (action == 1) & (draw.random(len(action)) < 0.15),
    ),
    # The chain, logged by a policy that is better than every other candidate.
    "wrong way": lambda _: replace(
        chain(right=0.95), easy=False,
        candidates={name: chain(right=0.95).candidates[name] for name in WITHOUT_RIGHT},
    ),
    # The chain, logged by a policy that always goes right, so other actions are unknown.
    "deterministic dataset": lambda _: replace(chain(right=1.0), easy=False),
    # The chain, eight episodes for the fit and eight held out.
    "tiny dataset": lambda _: replace(chain(), episodes=8, easy=False),
    # Three arms that differ by 0.02.
    "near ties": lambda _: bandit([1.0, 1.0, 0.98], [0.34, 0.33, 0.33], gaussian(1.0), 300),
    "noisy MDP": noisy_mdp,
    "good dataset": good_dataset,
    # Three arms, one of them better than the dataset by 0.64 with noise of 1.
    "plain arms": lambda _: bandit(
        [1.0, 0.0, 0.2], [0.3, 0.4, 0.3], gaussian(1.0), 300, easy=True
    ),
    "plain chain": lambda _: chain(),
    "random MDP": random_mdp,
}  # fmt: skip
