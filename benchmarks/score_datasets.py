"""The datasets of bench_scores.py, and the settings that each library's authors use.

``DATASETS`` has them all: how each is made, the updates and episodes of the plan, and which
methods learn from it. ``scored_data`` makes one, or reads it from the folder where an
earlier call wrote it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from iql_torchrl import load_dataset
from iql_torchrl.data import REFERENCE_RETURNS, OfflineDataset, normalised_score
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import ENVIRONMENT, NAME, SepsisTables
from iql_torchrl.data.builtin.recipes import import_for_recipe
from iql_torchrl.files import atomic_write

import gymnasium
import numpy as np

CACHE = Path.home() / ".cache" / "iql_torchrl" / "peers"
CARTPOLE_EPISODES = 400
LOCK = threading.Lock()
#: The paper's agent (preset ``locomotion``); on mazes the raw reward of 0 or 1, as CORL's configs.
OURS = {
    "hidden": [256, 256], "expectile": 0.7, "temperature": 3.0, "discount": 0.99,
    "polyak": 0.005, "actor_lr": 3e-4, "critic_lr": 3e-4, "value_lr": 3e-4, "batch_size": 256,
    "reward": "return_range",
}  # fmt: skip
#: pytorch/rl, sota-implementations/iql: offline_config.yaml, and discrete_iql.yaml below.
TORCHRL = {
    "hidden": [256, 256], "lr": 3e-4, "batch_size": 256, "loss_function": "l2", "gamma": 0.99,
    "tau": 0.005, "temperature": 3.0, "expectile": 0.7,
}  # fmt: skip
TORCHRL_DISCRETE = {
    "hidden": [256, 256], "lr": 3e-4, "batch_size": 256, "loss_function": "l2", "gamma": 0.99,
    "hard_update_interval": 10, "temperature": 100.0, "expectile": 0.8,
}  # fmt: skip
#: d3rlpy 2.8.1, reproductions/offline/iql.py; what is absent there is its ``IQLConfig``'s default.
D3RLPY = {
    "lr": 3e-4, "batch_size": 256, "weight_temp": 3.0, "max_weight": 100.0, "expectile": 0.7,
    "multiplier": 1000.0,
}  # fmt: skip
#: CORL at eeeeef2, algorithms/offline/iql.py: defaults of ``TrainConfig``, which are also those of
#: configs/offline/iql/maze2d; ``reward_scale`` is that of ``modify_reward`` where it applies.
CORL = {
    "lr": 3e-4, "batch_size": 256, "discount": 0.99, "tau": 0.005, "beta": 3.0, "iql_tau": 0.7,
    "iql_deterministic": False,
}  # fmt: skip
#: examples/iql_sepsis.py, which says how reward scaling and temperature follow from the dataset alone.
SEPSIS = {
    "hidden": [64], "batch_size": 2048, "discount": 0.999, "expectile": 0.7, "temperature": 2.0,
    "actor_lr": 1e-2, "critic_lr": 1e-2, "value_lr": 1e-2, "polyak": 0.05, "schedule": "cosine",
    "reward_map": [100.0, 0.0],
}  # fmt: skip
OWN = ("ours", "cloning")
CONTINUOUS = ("cloning", "ours", "d3rlpy", "TorchRL", "CORL")
DISCRETE = ("cloning", "ours", "TorchRL")


@dataclass
class Data:
    """A dataset as all methods get it, with raw rewards, and what is needed to play in its environment.

    ``score``: of the mean return; ``play``: in place of ``evaluate`` where the value is exact.
    """

    rows: dict[str, Any]
    make_env: Callable[[], gymnasium.Env[Any, Any]]
    reference: tuple[float, float]
    returns: Any
    play: Callable[[Callable[..., Any]], float] | None = None

    def dataset(self, reward: Any) -> OfflineDataset:
        """The rows with the spaces of the environment and this reward scaling."""
        env = self.make_env()
        env.close()
        return load_dataset(
            self.rows, observation_space=env.observation_space, action_space=env.action_space,
            reward=reward, progress=False,
        )  # fmt: skip

    def score(self, mean_return: float) -> float:
        return float(normalised_score(mean_return, self.reference))


@dataclass(frozen=True)
class ScoredDataset:
    """A dataset: how it is made, the numbers of updates and evaluation episodes, and the methods."""

    made: Callable[[Path], Data]
    updates: int
    episodes: int
    methods: tuple[str, ...] = CONTINUOUS
    raw_reward: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def columns(dataset: Any) -> dict[str, Any]:
    """The rows of a dataset with one tensor of observations, as numpy arrays."""
    rows = dataset.transitions.numpy()
    following = rows["next"]
    flat = {key: following[key][:, 0] for key in ("reward", "terminated", "truncated")}
    masks = {"action_mask": rows, "next_action_mask": following}
    given = {key: part["action_mask"] for key, part in masks.items() if "action_mask" in part}
    return {
        "observation": rows["observation"],
        "action": rows["action"],
        "next_observation": following["observation"],
        **flat,
        **given,
    }


def built_in(name: str, folder: Path) -> Any:
    """A dataset of this package, as a table that later calls reuse."""
    table = folder / name.replace("/", "-")
    table.parent.mkdir(parents=True, exist_ok=True)
    return load_dataset(ensure_dataset(name, progress=False), memmap=table, progress=False)


def pendulum(folder: Path) -> Data:
    dataset = built_in("pendulum/mixed-v0", folder)
    assert dataset.reference_scores is not None
    return Data(
        columns(dataset), dataset.make_env, dataset.reference_scores, dataset.episode_returns
    )


class Maze2d(gymnasium.Wrapper[Any, Any, Any, Any]):
    """D4RL's maze2d: the reward is 1 within 0.5 of a fixed goal, and episodes are only truncated.

    The start is in any open cell. As in D4RL the observation is position and velocity.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], goal: tuple[int, int]) -> None:
        super().__init__(env)
        self.observation_space = env.observation_space["observation"]  # type: ignore[index]
        self.maze: Any = env.unwrapped.maze  # type: ignore[attr-defined]
        self.cell = np.array(goal)
        self.goal = self.maze.cell_rowcol_to_xy(self.cell)
        self.open = [np.array(cell) for cell in np.argwhere(np.array(self.maze.maze_map) != 1)]

    def reward_at(self, position: Any) -> Any:
        return (np.linalg.norm(position - self.goal, axis=-1) <= 0.5).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        start = self.open[int(np.random.default_rng(seed).integers(len(self.open)))]
        cells = {"goal_cell": self.cell, "reset_cell": start}
        observation, info = self.env.reset(seed=seed, options=cells)
        self.env.unwrapped.goal = self.goal  # type: ignore[attr-defined]
        return observation["observation"], info

    def step(self, action: Any) -> Any:
        observation, _, _, truncated, info = self.env.step(action)
        info.pop("success", None)
        reward = float(self.reward_at(observation["achieved_goal"]))
        return observation["observation"], reward, False, truncated, info


def maze2d(maze: str, goal: tuple[int, int], folder: Path) -> Data:
    """The drives of ``pointmaze/...`` with D4RL's rewards: as D4RL relabels those of its controller."""
    import_for_recipe("gymnasium_robotics", f"pointmaze/{maze}-v0")
    dataset = built_in(f"pointmaze/{maze}-v0", folder)
    spec = dataset.make_env().spec
    spec.kwargs |= {"reset_target": False, "continuing_task": True}

    def make_env() -> Maze2d:
        return Maze2d(gymnasium.make(spec), goal)

    rows, task = dataset.transitions.numpy(), make_env()
    before, after = rows["observation"], rows["next"]["observation"]
    ends = rows["next"]["truncated"][:, 0]
    reward = task.reward_at(after["achieved_goal"])
    kept = {
        "observation": before["observation"],
        "action": rows["action"],
        "next_observation": after["observation"],
        "reward": reward,
        "terminated": np.zeros_like(ends),
        "truncated": ends,
    }
    returns = np.add.reduceat(reward, np.r_[0, np.flatnonzero(ends)[:-1] + 1])
    return Data(kept, make_env, REFERENCE_RETURNS[f"maze2d-{maze}"], returns)


def d4rl_maze2d(arguments: Sequence[str], folder: Path) -> Data:
    """The dataset that d4rl_maze2d.py writes, as long as D4RL's, and D4RL's task; a window a return.

    ``arguments`` of that script: the maze, and options of the recording.
    """
    import d4rl_maze2d as d4rl

    maze, *options = arguments
    words = "_".join(word.removeprefix("--") for word in arguments)
    path, limit = folder / f"d4rl_{words}.npz", d4rl.MAZES[maze][1]
    if not path.is_file():
        d4rl.main([maze, str(path), *options])
    with np.load(path) as table:
        rows = dict(table)
    whole = len(rows["reward"]) // limit * limit
    returns = rows["reward"][:whole].reshape(-1, limit).sum(1)
    return Data(rows, partial(d4rl.Maze2d, maze), REFERENCE_RETURNS[f"maze2d-{maze}"], returns)


def replay(task: str, folder: Path) -> Data:
    """What make_replay.py collects: every step of SAC while it learns."""
    environment, options = REPLAYS[task]
    path = folder / f"{task}_replay.npz"
    if not path.is_file():
        import make_replay

        make_replay.main([f"{environment}={path}", *options])
    dataset = load_dataset(path, env=environment, progress=False)
    make_env = partial(gymnasium.make, environment)
    return Data(columns(dataset), make_env, REFERENCE_RETURNS[task], dataset.episode_returns)


def sepsis(folder: Path) -> Data:
    dataset = built_in(NAME, folder)
    assert dataset.reference_scores is not None
    import_for_recipe("icu_sepsis", NAME)
    tables = SepsisTables(gymnasium.make(ENVIRONMENT, disable_env_checker=True))

    def play(act: Callable[..., Any]) -> float:
        states = np.arange(len(tables.admissible))
        policy = np.zeros(tables.admissible.shape)
        policy[states, act(states, tables.admissible)] = 1.0
        return tables.value(policy)

    return Data(
        columns(dataset),
        dataset.make_env,
        dataset.reference_scores,
        dataset.episode_returns,
        play=play,
    )


def cartpole(folder: Path) -> Data:
    """CartPole by a linear controller that is replaced by a constant push for parts of each episode.

    An episode consists of segments of geometrically distributed length (mean 10 steps); the
    controller has 30, 50, 70 or 90 % of them, in turn from episode to episode.
    """
    path = folder / "cartpole_mixed.npz"
    if not path.is_file():
        make_cartpole(path)
    dataset = load_dataset(path, env="CartPole-v1", progress=False)
    # 22.1: uniform actions in 1,000 episodes; 500: the limit of an episode
    make_env = partial(gymnasium.make, "CartPole-v1")
    return Data(columns(dataset), make_env, (22.1, 500.0), dataset.episode_returns)


def make_cartpole(path: Path, episodes: int = CARTPOLE_EPISODES) -> None:
    env = gymnasium.make("CartPole-v1")
    names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(episodes):
        generator = np.random.default_rng(number)
        competence = (0.3, 0.5, 0.7, 0.9)[number % 4]
        observation, _ = env.reset(seed=number)
        over, left, push = False, 0, None
        while not over:
            if left == 0:
                left = int(generator.geometric(0.1))
                push = None if generator.random() < competence else int(generator.integers(2))
            left -= 1
            good = int(observation @ np.array([0.1, 0.3, 3.0, 1.0]) > 0)
            action = good if push is None else push
            after, reward, terminated, truncated, _ = env.step(action)
            step = (observation, action, np.float32(reward), after, terminated, truncated)
            for name, value in zip(names, step, strict=True):
                rows[name].append(value)
            observation, over = after, terminated or truncated
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{name: np.array(values) for name, values in rows.items()})


#: d4rl_maze2d.py's arguments for ``d4rl-NAME``: its default, and what else D4RL's file may have been.
D4RL = {
    "umaze": ("umaze",),
    "medium": ("medium",),
    "umaze-terminals": ("umaze", "--reached", "terminals"),
    "umaze-noisy": ("umaze", "--noisy"),
}
#: Environment of each dataset ``NAME-replay``, and options of make_replay.py.
REPLAYS = {
    name: (environment, ("--steps", str(steps), "--width", "256", "--seed", "1"))
    for name, environment, steps in (
        ("hopper", "Hopper-v5", 110_000),
        ("halfcheetah", "HalfCheetah-v5", 120_000),
        ("walker2d", "Walker2d-v5", 120_000),
    )
}
DATASETS: dict[str, ScoredDataset] = {
    "pendulum": ScoredDataset(pendulum, updates=5_000, episodes=20),
    "sepsis": ScoredDataset(
        sepsis, updates=1_000, episodes=0, methods=DISCRETE, options={"ours": SEPSIS}
    ),
    "cartpole": ScoredDataset(cartpole, updates=1_000, episodes=20, methods=DISCRETE),
    "maze2d-umaze": ScoredDataset(
        partial(maze2d, "umaze", (1, 1)), updates=3_000, episodes=20, raw_reward=True
    ),
    "maze2d-medium": ScoredDataset(
        partial(maze2d, "medium", (6, 6)), updates=5_000, episodes=20, raw_reward=True
    ),
    **{
        f"{name}-replay": ScoredDataset(partial(replay, name), updates=50_000, episodes=20)
        for name in REPLAYS
    },
    **{
        f"d4rl-{name}": ScoredDataset(
            partial(d4rl_maze2d, arguments), updates=80_000, episodes=100, raw_reward=True
        )
        for name, arguments in D4RL.items()
    },
}


def options_of(scored: ScoredDataset, method: str, data: Data, corl: Path | None) -> dict[str, Any]:
    """The settings of ``method`` on ``scored``."""
    if method in ("ours", "cloning"):
        options: dict[str, Any] = dict(scored.options.get("ours", OURS))
        if scored.raw_reward:
            options["reward"] = "raw"
        return options | ({"temperature": 0.0} if method == "cloning" else {})
    if method == "TorchRL":
        return dict(TORCHRL_DISCRETE if scored.methods == DISCRETE else TORCHRL)
    if method == "d3rlpy":
        return dict(D3RLPY)
    spread = 1.0 if scored.raw_reward else 1000.0 / float(np.ptp(data.returns))
    return {**CORL, "reward_scale": spread, "file": str(corl)}


@cache
def _scored_data(name: str, peers: Path) -> tuple[Data, Path]:
    data, path = DATASETS[name].made(peers / "datasets"), peers / "datasets" / f"rows-{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **data.rows)
    return data, path


def scored_data(name: str, peers: Path) -> tuple[Data, Path]:
    """The dataset, and the file of its rows that all methods read."""
    with LOCK:
        return _scored_data(name, peers)


def about_dataset(name: str, peers: Path) -> dict[str, Any]:
    data, _ = scored_data(name, peers)
    returns = np.asarray(data.returns, float)
    return {
        "rows": len(data.rows["reward"]),
        "episodes": len(returns),
        "mean_return": float(returns.mean()),
        "score": data.score(float(returns.mean())),
        "reference_scores": list(data.reference),
        "evaluation": f"{DATASETS[name].episodes} episodes" if DATASETS[name].episodes else "exact",
        "terminations": int(np.sum(data.rows["terminated"])),
    }
