"""A dataset of mixed quality: everything that SAC collects while it learns a task of MuJoCo.

    python benchmarks/make_replay.py Hopper-v5=hopper_replay.npz

Trains TorchRL's ``SACLoss``, one update a step after ``--random-steps`` uniform ones, and writes every
transition in the order of collection, so the dataset holds episodes of an untrained policy next to
those of a trained one. One thread and fixed seeds; the last digits differ between machines. With
``--device cuda`` policy and update are CUDA graphs, and several tasks, each on a stream, take their
steps in turn. A file is replaced every 10,000 steps and is a complete table at any time: the one of a
shorter run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from tqdm import tqdm

BATCH, GAMMA, POLYAK, RATE = 256, 0.99, 0.005, 3e-4  # Haarnoja et al. 2018, table 1
STD_MIN = 1e-4
EVERY = 10_000
WARM = 3  # calls before a CUDA graph is recorded


class Graphed:
    """``work`` as it is on the CPU; on CUDA, on ``stream``, and a CUDA graph after ``WARM`` calls."""

    def __init__(self, work: Callable[[], None], stream: torch.cuda.Stream | None) -> None:
        self.work, self.stream, self.calls = work, stream, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.stream is not None and self.calls > WARM and self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.work()
        with torch.cuda.stream(self.stream):
            if self.graph is None:
                self.work()
            else:
                self.graph.replay()


class Learner:
    """The networks of SAC, the rows so far, and updates with an own target entropy, -|A|.

    A row is one float32 vector: observation, action, next observation, reward, terminated, truncated.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], width: int, rows: int, device: str = "cpu"
    ) -> None:
        box = env.action_space
        assert isinstance(box, gymnasium.spaces.Box), box
        size, action = env.observation_space.shape[0], box.shape[0]  # type: ignore[index]
        cuda = torch.device(device).type == "cuda"
        low, high = (torch.as_tensor(bound, device=device) for bound in (box.low, box.high))
        spec = Bounded(low, high, box.shape, device=device)
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
            distribution_kwargs={"low": low, "high": high},
        ).to(device)
        critics = [
            ValueOperator(networks.Critic(size, action, **form), in_keys=["observation", "action"])
            for _ in range(2)
        ]
        self.loss = SACLoss(
            self.actor, critics, num_qvalue_nets=2, loss_function="l2", action_spec=spec
        )
        self.loss.make_value_estimator(gamma=GAMMA)
        self.loss.to(device)
        self.targets = SoftUpdate(self.loss, tau=POLYAK)
        self.optimizer = torch.optim.Adam(
            self.loss.parameters(), lr=RATE, fused=True, capturable=cuda
        )
        self.sizes = (size, action, size, 1, 1, 1)
        self.table = torch.zeros(rows, sum(self.sizes), device=device)
        self.filled = torch.zeros((), device=device, dtype=torch.float64)
        self._observation = torch.zeros(1, size, pin_memory=cuda)
        self._input = torch.zeros(1, size, device=device)
        self._action = torch.zeros(1, action, device=device)
        self.stream = torch.cuda.Stream(device) if cuda else None
        self._act = Graphed(self._policy, self.stream)
        self.update = Graphed(self._update, self.stream)

    def act(self, observation: NDArray[Any]) -> NDArray[np.float32]:
        """One sample of the policy, shape (A,)."""
        self._observation[0] = torch.as_tensor(observation)
        with torch.cuda.stream(self.stream):
            self._input.copy_(self._observation, non_blocking=True)
        self._act()
        with torch.cuda.stream(self.stream):
            return self._action[0].cpu().numpy().copy()

    def add(self, number: int, *parts: Any) -> None:
        """Write a row; ``parts`` as in the class's docstring."""
        row = torch.as_tensor(np.concatenate([np.atleast_1d(part) for part in parts]))
        with torch.cuda.stream(self.stream):
            self.table[number].copy_(row)
            self.filled.fill_(number + 1)

    def columns(self, rows: int) -> dict[str, NDArray[Any]]:
        """The columns of a dataset: the first ``rows`` rows."""
        parts = [part.cpu().numpy() for part in self.table[:rows].split(self.sizes, dim=1)]
        observation, action, after, reward, terminated, truncated = parts
        return {
            "obs": observation,
            "next_obs": after,
            "action": action,
            "reward": reward[:, 0],
            "terminated": terminated[:, 0] > 0,
            "truncated": truncated[:, 0] > 0,
        }

    @torch.no_grad()
    def _policy(self) -> None:
        with set_exploration_type(ExplorationType.RANDOM):
            out = self.actor(TensorDict({"observation": self._input}, [1]))
        self._action.copy_(out["action"])

    def _update(self) -> None:
        losses = self.loss(self._batch())
        total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.targets.step()

    def _batch(self) -> TensorDict:
        """Rows drawn uniformly, as SACLoss reads them; termination alone stops the bootstrap."""
        drawn = torch.rand(BATCH, device=self.table.device, dtype=torch.float64)
        index = (drawn * self.filled).long()
        parts: tuple[Tensor, ...] = self.table[index].split(self.sizes, dim=1)
        observation, action, after, reward, terminated, _ = parts
        ended = terminated > 0
        following = {
            "observation": after,
            "reward": reward,
            "terminated": ended,
            "done": ended,
        }
        return TensorDict(
            {"observation": observation, "action": action, "next": following}, [BATCH]
        )


class Recording:
    """A task, its learner and the steps made so far."""

    def __init__(self, environment: str, path: Path, o: argparse.Namespace) -> None:
        self.path, self.steps, self.random_steps, self.made = path, o.steps, o.random_steps, 0
        self.env = gymnasium.make(environment)
        self.env.action_space.seed(o.seed)
        self.learner = Learner(self.env, o.width, o.steps, o.device)
        self.observation, _ = self.env.reset(seed=o.seed)

    def step(self) -> None:
        """One step of the environment, and one update after the uniform actions."""
        uniform = self.made < self.random_steps
        action = self.env.action_space.sample() if uniform else self.learner.act(self.observation)
        after, reward, terminated, truncated, _ = self.env.step(action)
        self.learner.add(self.made, self.observation, action, after, reward, terminated, truncated)
        self.made += 1
        self.observation = after
        if terminated or truncated:
            self.observation, _ = self.env.reset()
        if not uniform:
            self.learner.update()
        if self.made % EVERY == 0 or self.made == self.steps:
            print(f"{self.path}: {self.made:,} steps; {of_the_episodes(self.write())}", flush=True)

    def write(self) -> dict[str, NDArray[Any]]:
        """Write the rows so far, of which the last ends an episode, to the file; return the columns."""
        table = self.learner.columns(self.made)
        table["truncated"][-1] |= not table["terminated"][-1]
        with atomic_write(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, **table)  # type: ignore[arg-type]
        return table


def collect(o: argparse.Namespace) -> None:
    """Train for ``o.steps`` environment steps of each task, and write the datasets."""
    torch.set_num_threads(1)
    torch.manual_seed(o.seed)
    recordings = [Recording(environment, path, o) for environment, path in o.tasks]
    for _ in tqdm(range(o.steps), desc="SAC", unit="step", disable=None):
        for recording in recordings:
            recording.step()
    for recording in recordings:
        recording.env.close()


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


def task(text: str) -> tuple[str, Path]:
    """Environment and file of ENVIRONMENT=FILE."""
    environment, _, path = text.partition("=")
    if not environment or Path(path).suffix != ".npz":
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected ENVIRONMENT=FILE with a file name that ends in .npz, such as "
            "Hopper-v5=hopper_replay.npz"
        )
    return environment, Path(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("tasks", type=task, nargs="+", metavar="ENVIRONMENT=FILE", help="Gymnasium's name, .npz")
    add("--steps", type=int, default=100_000, help="environment steps, one row each")
    add("--random-steps", type=int, default=5_000, help="uniform actions at the start")
    add("--width", type=int, default=128, help="of the two hidden layers of each network")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="of the learner, such as cuda")
    collect(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
