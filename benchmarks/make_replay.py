"""A log of mixed quality: everything that SAC collects while it learns a task of MuJoCo.

    python benchmarks/make_replay.py Hopper-v5 hopper_replay.npz

Trains TorchRL's ``SACLoss``, one update a step after ``--random-steps`` uniform ones, and writes every
transition in the order of collection, so the dataset holds episodes of an untrained policy next to
those of a trained one. One thread and fixed seeds; the last digits differ between machines. The file
is replaced every 10,000 steps and is a complete table at any time: the one of a shorter run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iql_torchrl import networks
from iql_torchrl.files import atomic_write

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from tqdm import tqdm

BATCH, GAMMA, POLYAK, RATE = 256, 0.99, 0.005, 3e-4  # Haarnoja et al. 2018, table 1
STD_MIN = 1e-4
EVERY = 10_000


class Learner:
    """The networks of SAC, and one update of all of them with an own target entropy, -|A|."""

    def __init__(self, env: gymnasium.Env[Any, Any], width: int) -> None:
        box = env.action_space
        assert isinstance(box, gymnasium.spaces.Box), box
        spec = Bounded(torch.as_tensor(box.low), torch.as_tensor(box.high), box.shape)
        size, action = env.observation_space.shape[0], box.shape[0]  # type: ignore[index]
        form = {"hidden": (width, width), "initialisation": "torch"}
        head = nn.Sequential(
            networks.MLP(size, 2 * action, **form), NormalParamExtractor(scale_lb=STD_MIN)
        )
        # TorchRL's distribution keeps the value before the tanh: without it the entropy of
        # saturated actions is wrong, and SAC learns to saturate them.
        self.actor = ProbabilisticActor(
            TensorDictModule(head, in_keys=["observation"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=spec,
            distribution_class=TanhNormal,
            distribution_kwargs={"low": spec.space.low, "high": spec.space.high},
        )
        critics = [
            ValueOperator(networks.Critic(size, action, **form), in_keys=["observation", "action"])
            for _ in range(2)
        ]
        self.loss = SACLoss(
            self.actor, critics, num_qvalue_nets=2, loss_function="l2", action_spec=spec
        )
        self.loss.make_value_estimator(gamma=GAMMA)
        self.targets = SoftUpdate(self.loss, tau=POLYAK)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=RATE, fused=True)

    @torch.no_grad()
    def act(self, observation: NDArray[Any]) -> NDArray[np.float32]:
        """One sample of the policy, shape (A,)."""
        row = torch.as_tensor(observation, dtype=torch.float32)[None]
        with set_exploration_type(ExplorationType.RANDOM):
            action = self.actor(TensorDict({"observation": row}, [1]))["action"][0]
        return np.asarray(action.numpy(), dtype=np.float32)

    def update(self, batch: TensorDict) -> None:
        losses = self.loss(batch)
        total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.targets.step()


def transition(
    observation: NDArray[Any], action: NDArray[Any], after: NDArray[Any], reward: float, ended: bool
) -> TensorDict:
    """One row as SACLoss reads it; ``ended``: terminated, which alone stops the bootstrap."""
    following = {
        "observation": torch.as_tensor(after, dtype=torch.float32),
        "reward": torch.tensor([reward], dtype=torch.float32),
        "terminated": torch.tensor([ended]),
        "done": torch.tensor([ended]),
    }
    row = {
        "observation": torch.as_tensor(observation, dtype=torch.float32),
        "action": torch.as_tensor(action),
        "next": following,
    }
    return TensorDict(row, [])


def collect(o: argparse.Namespace) -> dict[str, NDArray[Any]]:
    """Train for ``o.steps`` environment steps; write and return the columns of the dataset."""
    torch.set_num_threads(1)
    torch.manual_seed(o.seed)
    env = gymnasium.make(o.environment)
    env.action_space.seed(o.seed)
    learner = Learner(env, o.width)
    storage = LazyTensorStorage(o.steps)
    replay = TensorDictReplayBuffer(storage=storage, batch_size=BATCH)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("obs", "next_obs", "action", "reward", "terminated", "truncated")
    }
    observation, _ = env.reset(seed=o.seed)
    bar = tqdm(range(1, o.steps + 1), desc=f"SAC on {o.environment}", unit="step", disable=None)
    for step in bar:
        action = env.action_space.sample() if step <= o.random_steps else learner.act(observation)
        after, reward, terminated, truncated, _ = env.step(action)
        row = (observation, after, action, float(reward), bool(terminated), bool(truncated))
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
        replay.add(transition(observation, action, after, float(reward), bool(terminated)))
        observation = after
        if terminated or truncated:
            observation, _ = env.reset()
        if step > o.random_steps:
            learner.update(replay.sample())
        if step % EVERY == 0 or step == o.steps:
            table = write(o.path, columns)
            print(f"{step:,} steps; {of_the_episodes(table)}", flush=True)
    env.close()
    return table


def write(path: Path, columns: dict[str, list[Any]]) -> dict[str, NDArray[Any]]:
    """The columns as arrays, written to ``path``; the recording ends by truncation at the latest."""
    table = {
        name: np.asarray(values, bool if name in ("terminated", "truncated") else np.float32)
        for name, values in columns.items()
    }
    table["truncated"][-1] |= not table["terminated"][-1]
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **table)  # type: ignore[arg-type]
    return table


def of_the_episodes(table: dict[str, NDArray[Any]]) -> str:
    """Number, ends and returns of the episodes in words; the last one may be cut short."""
    ends = np.flatnonzero(table["terminated"] | table["truncated"])
    returns = np.add.reduceat(table["reward"].astype(float), np.r_[0, ends[:-1] + 1])
    low, middle, high = np.percentile(returns, (25, 50, 75))
    return (
        f"{len(ends)} episodes, {table['terminated'].sum()} terminated and "
        f"{table['truncated'].sum()} truncated; return: mean {returns.mean():.0f}, quartiles "
        f"{low:.0f}, {middle:.0f}, {high:.0f}, greatest {returns.max():.0f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("environment", help="Gymnasium's name, such as Hopper-v5")
    add("path", type=Path, help="the file to write, .npz")
    add("--steps", type=int, default=100_000, help="environment steps, one row each")
    add("--random-steps", type=int, default=5_000, help="uniform actions at the start")
    add("--width", type=int, default=128, help="of the two hidden layers of each network")
    add("--seed", type=int, default=0)
    o = parser.parse_args(arguments)
    if o.path.suffix != ".npz":
        parser.error(f"path is {o.path}; expected a name that ends in .npz.")
    collect(o)


if __name__ == "__main__":
    main()
