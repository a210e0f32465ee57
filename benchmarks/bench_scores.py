"""Scores of IQL here, in d3rlpy, TorchRL and CORL, and of behaviour cloning, on the same logs.

    python benchmarks/bench_scores.py --peers FOLDER --jobs 2
    python benchmarks/bench_scores.py --peers FOLDER --time
    python benchmarks/bench_scores.py --page docs/scores.md

Every cell (log, method, seed) trains in a process of its own with one thread, in the virtual
environment of its library below FOLDER, which the first call makes (d3rlpy pins an older Gymnasium).
Its policy is then asked for deterministic actions, and ``iql_torchrl.evaluate`` plays it, so that
environment, seeds and loop are the same for all. A cell is written to benchmarks/results/scores.json
as soon as it is done, and the evaluations of an unfinished one under ``unfinished``; the same command
continues with the cells that are missing.

The defaults are the plan of the published table: ``--seeds 5``, and for each log the updates in
``LOGS`` (``--updates LOG=N`` changes them). Settings are those of each library's authors (``METHODS``
names the files); only the schedules' lengths, and the bounds of actions, follow from the dataset.
CORL takes part if ``--corl FILE`` names its iql.py, which is not a package:

    curl -O https://raw.githubusercontent.com/corl-team/CORL/main/algorithms/offline/iql.py

``--join NAME ...`` adds the cells of other result files, of runs at the same time or of
score_population.py. ``--time`` measures the time of 1,000 updates instead: blocks of all methods
alternate, each in its own process while the others wait, and medians are written to
benchmarks/results/scores_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from iql_torchrl import evaluate, load_dataset
from iql_torchrl.data import REFERENCE_RETURNS, normalised_score
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import ENVIRONMENT, NAME, SepsisTables
from iql_torchrl.data.builtin.recipes import import_for_recipe
from iql_torchrl.evaluation.statistics import (
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
)
from iql_torchrl.files import atomic_write
from record import RESULTS, processor, save
from report import replace_table

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModule

WORKER = Path(__file__).with_name("score_methods.py")
CACHE = Path.home() / ".cache" / "iql_torchrl" / "peers"
EVALUATION_SEED = 10_000
CHUNK = 250  # updates of one command to a process: the least that may be asked for
CAPTURED = 25  # updates of one call of the captured form, as in score_methods.py
CARTPOLE_EPISODES = 400

#: The pip requirements of each method's environment; none: that of this package.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "cloning": (),
    "TorchRL": ("torch==2.13.0", "torchrl==0.14.1", "tensordict==0.14.3"),
    "d3rlpy": ("torch==2.13.0", "d3rlpy==2.8.1"),
    "CORL": ("torch==2.13.0", "numpy"),
}
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
#: Of our own settings those that the page shows; the result file has all.
OWN = ("ours", "cloning")
SHOWN = (*OURS, *SEPSIS, "schedule", "order", "standardise", "initialisation", "policy")
#: CORL's README at eeeeef2, "Last Scores": mean and deviation over its seeds.
PUBLISHED = {
    "d4rl-umaze": {"ours": (42.11, 0.58), "CORL": (42.11, 0.58), "cloning": (0.36, 8.69)},
    "d4rl-medium": {"ours": (34.85, 2.72), "CORL": (34.85, 2.72), "cloning": (0.79, 3.25)},
}
#: Updates that the table of published scores shows.
MILLION = (100_000, 200_000, 300_000, 400_000, 500_000, 700_000, 1_000_000)
#: Ends of the names of its result files, and what was changed in ours.
MILLION_SETTINGS = {
    "": "",
    "_torch": "torch's weights",
    "_corl_settings": "CORL's weights and order",
}
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

    def score(self, mean_return: float) -> float:
        return float(normalised_score(mean_return, self.reference))


@dataclass(frozen=True)
class Log:
    """One line of the table: how the log is made, and the plan for it."""

    made: Callable[[Path], Data]
    updates: int
    episodes: int
    methods: tuple[str, ...] = CONTINUOUS
    raw_reward: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# -- the datasets --------------------------------------------------------------------------------------


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
    """A log of this package, as a table that later calls reuse."""
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
    """D4RL's maze2d task: a fixed goal that is not seen, reward 1 within 0.5 of it, no termination.

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
LOGS: dict[str, Log] = {
    "pendulum": Log(pendulum, updates=5_000, episodes=20),
    "sepsis": Log(sepsis, updates=1_000, episodes=0, methods=DISCRETE, options={"ours": SEPSIS}),
    "cartpole": Log(cartpole, updates=1_000, episodes=20, methods=DISCRETE),
    "maze2d-umaze": Log(
        partial(maze2d, "umaze", (1, 1)), updates=3_000, episodes=20, raw_reward=True
    ),
    "maze2d-medium": Log(
        partial(maze2d, "medium", (6, 6)), updates=5_000, episodes=20, raw_reward=True
    ),
    **{
        f"{name}-replay": Log(partial(replay, name), updates=50_000, episodes=20)
        for name in REPLAYS
    },
    **{
        f"d4rl-{name}": Log(
            partial(d4rl_maze2d, arguments), updates=80_000, episodes=100, raw_reward=True
        )
        for name, arguments in D4RL.items()
    },
}
#: What a call without ``--logs`` runs: the published table, about an hour and a half of one core.
PLAN = ("pendulum", "sepsis", "cartpole", "maze2d-umaze")


def options_of(log: Log, method: str, data: Data, corl: Path | None) -> dict[str, Any]:
    """The settings of ``method`` on ``log``."""
    if method in ("ours", "cloning"):
        options: dict[str, Any] = dict(log.options.get("ours", OURS))
        if log.raw_reward:
            options["reward"] = "raw"
        return options | ({"temperature": 0.0} if method == "cloning" else {})
    if method == "TorchRL":
        return dict(TORCHRL_DISCRETE if log.methods == DISCRETE else TORCHRL)
    if method == "d3rlpy":
        return dict(D3RLPY)
    spread = 1.0 if log.raw_reward else 1000.0 / float(np.ptp(data.returns))
    return {**CORL, "reward_scale": spread, "file": str(corl)}


# -- processes -------------------------------------------------------------------------------------


def interpreter(method: str, peers: Path) -> Path:
    """Python of the method's virtual environment, which is made first if it is absent."""
    requirements = ENVIRONMENTS[method]
    if not requirements:
        return Path(sys.executable)
    folder = peers / method.lower()
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.is_file():
        print(f"making the environment of {method} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(install, check=True)
        done.touch()
    return python


class Worker:
    """A process that has one learner; see score_methods.py."""

    def __init__(self, python: Path, method: str, task: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # A peer's environment must not see this package.
        if python != Path(sys.executable):
            environment.pop("PYTHONPATH", None)
        else:
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        self.messages = task.with_suffix(".log")
        with self.messages.open("w") as messages:
            self.process = subprocess.Popen(
                [str(python), str(WORKER), method, str(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env=environment,
            )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # if the process has ended, its messages are read below
            print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            last = "\n".join(self.messages.read_text().splitlines()[-15:])
            raise RuntimeError(f"a process has ended ({self.messages}):\n{last}")
        result: dict[str, Any] = json.loads(line)
        return result

    def act(self, observations: Any, masks: Any = None) -> Any:
        given = {"mask": np.asarray(masks).tolist()} if masks is not None else {}
        return np.asarray(self.ask(act=np.asarray(observations).tolist(), **given)["actions"])

    def close(self) -> None:
        with suppress(BrokenPipeError), self.process:  # closes the pipes and waits for its end
            pass


@contextmanager
def worker(
    o: argparse.Namespace, name: str, method: str, seed: int, updates: int, **changed: Any
) -> Iterator[tuple[Worker, Data]]:
    """A process that will train ``method`` on the dataset ``name``, and the dataset."""
    data, path = log_data(name, o.peers)
    task: dict[str, Any] = {
        "rows": str(path), "seed": seed, "updates": updates,
        "chunk": o.block if o.time else min(CHUNK, updates),
        "options": options_of(LOGS[name], method, data, o.corl) | changed,
    }  # fmt: skip
    env = data.make_env()
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        task["actions"] = int(env.action_space.n)
    else:
        assert isinstance(env.action_space, gymnasium.spaces.Box)
        task |= {"low": env.action_space.low.tolist(), "high": env.action_space.high.tolist()}
    if isinstance(env.observation_space, gymnasium.spaces.Discrete):
        task["states"] = int(env.observation_space.n)
    env.close()
    label = "-".join(str(each) for each in (name, method, seed, updates, *changed.values()))
    file = o.peers / "tasks" / f"{label}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(task))
    process = Worker(interpreter(method, o.peers), method, file)
    try:
        yield process, data
    finally:
        process.close()


RESULT_LOCK, LOG_LOCK = threading.Lock(), threading.Lock()


@cache
def _log_data(name: str, peers: Path) -> tuple[Data, Path]:
    data, path = LOGS[name].made(peers / "logs"), peers / "logs" / f"rows-{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **data.rows)
    return data, path


def log_data(name: str, peers: Path) -> tuple[Data, Path]:
    """The dataset, and the file of its rows that all methods read."""
    with LOG_LOCK:
        return _log_data(name, peers)


# -- scores ----------------------------------------------------------------------------------------


def mean_return(data: Data, act: Callable[..., Any], episodes: int) -> float:
    """Of ``episodes`` episodes from fixed seeds, by the package's own loop; or the exact value."""
    if data.play is not None:
        return data.play(act)
    env = data.make_env()
    box = env.action_space if isinstance(env.action_space, gymnasium.spaces.Box) else None
    env.close()

    class Asked(torch.nn.Module):
        """Actions from the other process, within the bounds."""

        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            actions = act(observation.numpy())
            if box is None:
                return torch.as_tensor(actions)
            return torch.as_tensor(np.clip(actions, box.low, box.high).astype(np.float32))

    policy = TensorDictModule(Asked(), in_keys=["observation"], out_keys=["action"])
    played = evaluate(
        policy, data.make_env, episodes=episodes, num_envs=episodes, seed=EVALUATION_SEED
    )
    return float(played.returns.mean())


def cell(
    o: argparse.Namespace,
    name: str,
    method: str,
    seed: int,
    evaluated: Callable[[list[Any]], None] = lambda curve: None,
) -> dict[str, Any]:
    """Train and evaluate one method with one seed; ``evaluated`` gets the curve so far."""
    log, updates, began = LOGS[name], o.updates[name], time.perf_counter()
    changed = o.change if method in OWN else {}
    with worker(o, name, method, seed, updates, **changed) as (process, data):
        about = process.ask(about=True)
        points = sorted({updates * (i + 1) // o.points // CHUNK * CHUNK for i in range(o.points)})
        points, done, cpu, curve = [point for point in points if point] or [updates], 0, 0.0, []
        for point in [*points[:-1], updates]:
            cpu += process.ask(learn=point - done)["cpu_seconds"]
            done, value = point, mean_return(data, process.act, log.episodes)
            curve.append([point, value, data.score(value)])
            evaluated(curve)
    return {
        "log": name, "method": method, "seed": seed, "updates": updates,
        "return": curve[-1][1], "score": curve[-1][2], "curve": curve,
        "cpu_seconds": cpu, "wall_seconds": time.perf_counter() - began, **about,
    }  # fmt: skip


def missing(o: argparse.Namespace, cells: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """The cells of the plan that are not in ``cells``; all methods of a seed before the next seed."""
    done = set(map(identity, cells))
    plan = [
        (name, method, seed)
        for name in o.logs
        for seed in range(o.seeds)
        for method in LOGS[name].methods
        if method in o.methods and (method != "CORL" or o.corl is not None)
    ]
    return [each for each in plan if (*each, o.updates[each[0]]) not in done]


def add(content: dict[str, Any], result: dict[str, Any]) -> None:
    """Put a cell into the results; ``SystemExit`` if its settings are not those of earlier cells."""
    name, method = result["log"], result["method"]
    settings = {k: v for k, v in result.pop("settings").items() if k not in ("seed", "updates")}
    versions = result.pop("versions")
    about = {"settings": settings, "versions": versions}
    known = content["settings"].setdefault(name, {}).setdefault(method, about)
    if known != about:
        raise SystemExit(
            f"{name}, {method}: the settings or versions are not those of the cells in the result "
            "file. Delete that file, or name another with --result."
        )
    content["cells"].append(result)
    content["summary"] = summarise(content["cells"])


def join(names: Sequence[str], path: Path) -> None:
    """Add the cells of the result files ``names`` that ``path`` does not have yet."""
    content = read(path)
    for name in names:
        other = read(RESULTS / f"{name}.json")
        for key, about in other["logs"].items():
            if content["logs"].setdefault(key, about) != about:
                raise SystemExit(f"{name}: {key} is another dataset than that of {path.name}")
        for each in other["cells"]:
            about = other["settings"][each["log"]][each["method"]]
            if identity(each) not in map(identity, content["cells"]):
                add(content, each | about)
    save(path, content, packages=("gymnasium", "mujoco"))


def identity(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[key] for key in ("log", "method", "seed", "updates"))


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each log, number of updates and method: interquartile means over seeds, 95 % intervals.

    ``better_than``: the probability that a run of ours has a higher score than one of this method.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for each in cells:
        groups.setdefault((each["log"], each["updates"], each["method"]), []).append(each)
    lines = []
    for (name, updates, method), group in groups.items():
        line: dict[str, Any] = {
            "log": name,
            "updates": updates,
            "method": method,
            "seeds": len(group),
            "processors": sorted({each["processor"] for each in group}),
        }
        for quantity in ("score", "return"):
            values = np.array([each[quantity] for each in group])
            line[quantity] = float(interquartile_mean(values))
            line[f"{quantity}_interval"] = list(
                stratified_interval(interquartile_mean, [values], seed=0)
            )
        rivals = groups.get((name, updates, "ours"), [])
        if method != "ours" and rivals:
            both = [np.array([c["score"] for c in part]) for part in (rivals, group)]
            line["ours_better"] = float(probability_of_improvement(*both))
        lines.append(line)
    return lines


def about_log(name: str, peers: Path) -> dict[str, Any]:
    data, _ = log_data(name, peers)
    returns = np.asarray(data.returns, float)
    return {
        "rows": len(data.rows["reward"]),
        "episodes": len(returns),
        "mean_return": float(returns.mean()),
        "score": data.score(float(returns.mean())),
        "reference_scores": list(data.reference),
        "evaluation": f"{LOGS[name].episodes} episodes" if LOGS[name].episodes else "exact",
        "terminations": int(np.sum(data.rows["terminated"])),
    }


def run(o: argparse.Namespace, path: Path) -> None:
    content = read(path)
    plan = missing(o, content["cells"])
    for method in dict.fromkeys(each[1] for each in plan):
        interpreter(method, o.peers)  # one after the other, before processes need it

    def one(each: tuple[str, str, int]) -> None:
        label = ", ".join(map(str, (*each, o.updates[each[0]])))

        def evaluated(curve: list[Any]) -> None:
            with RESULT_LOCK:
                content["unfinished"][label] = {"curve": curve, "processor": processor()}
                save(path, content, packages=("gymnasium", "mujoco"))

        result = cell(o, *each, evaluated=evaluated) | {"processor": processor()}
        described = about_log(each[0], o.peers)
        with RESULT_LOCK:
            content["logs"][each[0]] = described
            content["unfinished"].pop(label, None)
            add(content, result)
            save(path, content, packages=("gymnasium", "mujoco"))
            left = len(missing(o, content["cells"]))
            text = f"{each[0]} {each[1]} seed {each[2]}: return {result['return']:.4g}, score "
            text += f"{result['score']:.1f} ({result['wall_seconds']:.0f} s; {left} left)"
            print(text, flush=True)

    with ThreadPoolExecutor(o.jobs) as pool:
        for done in [pool.submit(one, each) for each in plan]:
            done.result()


def read(path: Path) -> dict[str, Any]:
    """The results so far, without the record of the machine, which is written anew."""
    if not path.is_file():
        return {"logs": {}, "settings": {}, "cells": [], "summary": [], "unfinished": {}}
    content: dict[str, Any] = json.loads(path.read_text())
    results = {key: content[key] for key in ("logs", "settings", "cells", "summary")}
    return results | {"unfinished": content.get("unfinished", {})}


# -- time ------------------------------------------------------------------------------------------


def measure(o: argparse.Namespace, path: Path) -> None:
    """Seconds of 1,000 updates: blocks of all methods alternate, each alone while the others wait."""
    content: dict[str, Any] = {"block": o.block, "rounds": o.rounds, "times": []}
    for name in o.logs:
        methods = [m for m in LOGS[name].methods if m in o.methods and m != "cloning"]
        variants = [(m, m, {}) for m in methods if m != "CORL" or o.corl is not None]
        variants += [
            (f"ours {f}", "ours", {"form": f}) for f in ("compiled", "captured") if o.forms
        ]
        blocks: dict[str, list[float]] = {label: [] for label, *_ in variants}
        processes: dict[str, Worker] = {}
        stack = []
        try:
            for label, method, changed in variants:
                context = worker(o, name, method, 0, 10**6, **changed)
                stack.append(context)
                processes[label], _ = context.__enter__()
                processes[label].ask(learn=o.block)
            for _ in range(o.rounds):
                for label, process in processes.items():
                    blocks[label].append(process.ask(learn=o.block)["seconds"] / o.block * 1000)
        finally:
            for context in stack:
                context.__exit__(None, None, None)
        for label, seconds in blocks.items():
            ratios = [a / b for a, b in zip(seconds, blocks["ours"], strict=True)]
            line = {
                "log": name, "method": label, "seconds": statistics.median(seconds),
                "of_ours": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios),
                "blocks": seconds,
            }  # fmt: skip
            content["times"].append(line)
            text = f"{name} {label}: {line['seconds']:.2f} s, of ours {line['of_ours']:.2f}"
            print(f"{text} ({line['least']:.2f} to {line['greatest']:.2f})", flush=True)
        save(path, content, packages=("gymnasium",))


# -- tables ----------------------------------------------------------------------------------------


def score_cell(line: Mapping[str, Any]) -> str:
    """A score with its interval over seeds; with its number of seeds if they are fewer than three."""
    low, high = line["score_interval"]
    several = line["seeds"] > 2
    seeds = f"{line['seeds']} seed{'s' if line['seeds'] > 1 else ''}"
    return f"{line['score']:.1f}<br>({f'{low:.1f} to {high:.1f}' if several else seeds})"


def table(content: Mapping[str, Any]) -> str:
    """Markdown: a row a dataset, with the interquartile mean of the scores of each method."""
    methods = [m for m in CONTINUOUS if any(line["method"] == m for line in content["summary"])]
    head = ["log", "updates", "of the dataset", *methods, "processor"]
    text = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 2) + "|---|"]
    for name, updates in dict.fromkeys((e["log"], e["updates"]) for e in content["summary"]):
        lines = {
            line["method"]: line
            for line in content["summary"]
            if (line["log"], line["updates"]) == (name, updates)
        }
        cells = [score_cell(lines[m]) if m in lines else "-" for m in methods]
        log = content["logs"][name]
        cells.append("; ".join(dict.fromkeys(each for e in lines.values() for each in _on(e))))
        text.append("| " + " | ".join([name, f"{updates:,}", f"{log['score']:.1f}", *cells]) + " |")
    return "\n".join(text)


def _on(line: Mapping[str, Any]) -> list[str]:
    return [each.replace("(R)", "").replace(" Processor", "") for each in line["processors"]]


def cost_table(content: Mapping[str, Any]) -> str:
    """Markdown: what the runs of each method cost, without their evaluations and populations."""
    text = [
        "| method | runs | seconds of 1,000 updates | hours of all runs |",
        "|---|---:|---:|---:|",
    ]
    for method in CONTINUOUS:
        cells = [cell for cell in content["cells"] if cell["method"] == method]
        cells = [cell for cell in cells if "cpu_seconds" in cell]
        if cells:
            each = [1000 * cell["cpu_seconds"] / cell["updates"] for cell in cells]
            hours = sum(cell["cpu_seconds"] for cell in cells) / 3600
            text.append(
                f"| {method} | {len(cells)} | {statistics.median(each):.1f} | {hours:.2f} |"
            )
    return "\n".join(text)


def curves(content: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[int, float]]]:
    """For each log and method the scores of its runs by updates, unfinished ones too."""
    runs: dict[tuple[str, str], list[dict[int, float]]] = {}
    running = [(label.split(", "), part["curve"]) for label, part in content["unfinished"].items()]
    done = [((cell["log"], cell["method"]), cell["curve"]) for cell in content["cells"]]
    for (name, method, *_), curve in [*done, *running]:
        runs.setdefault((name, method), []).append({point: score for point, _, score in curve})
    return runs


def published_table(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: means and deviations over seeds during training here, and those of CORL's README.

    ``contents``: result files, each by what its settings of ours are.
    """
    heads = [f"{point // 1000:,}" for point in MILLION]
    text = ["| dataset | method | seeds | " + " | ".join(heads) + " | CORL's README |"]
    text.append("|---|---|---:|" + "---:|" * (len(heads) + 1))
    groups = [
        (name, method, settings, runs)
        for settings, content in contents.items()
        for (name, method), runs in curves(content).items()
    ]
    for name, method, settings, runs in sorted(groups, key=lambda group: group[:3]):
        scores = [[run[point] for run in runs if point in run] for point in MILLION]
        cells = [_mean_and_deviation(each) for each in scores]
        published = PUBLISHED["-".join(name.split("-")[:2])][method]
        cells.append(f"{published[0]} ± {published[1]}")
        label = f"{method}, {settings}" if settings else method
        text.append("| " + " | ".join([name, label, str(len(runs)), *cells]) + " |")
    return "\n".join(text)


def _mean_and_deviation(scores: Sequence[float]) -> str:
    if not scores:
        return "-"
    return f"{np.mean(scores):.1f}" + (f" ± {np.std(scores):.1f}" if len(scores) > 1 else "")


def times_table(content: Mapping[str, Any]) -> str:
    """Markdown: a row a method, a column a dataset: seconds of 1,000 updates, their ratio to ours."""
    names = list(dict.fromkeys(line["log"] for line in content["times"]))
    labels = list(dict.fromkeys(line["method"] for line in content["times"]))
    text = ["| | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    lines = {(line["log"], line["method"]): line for line in content["times"]}
    for label in labels:
        found = [lines.get((name, label)) for name in names]
        cells = ["-" if e is None else f"{e['seconds']:.1f} ({e['of_ours']:.2f})" for e in found]
        text.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(text)


def learning_table(content: Mapping[str, Any]) -> str:
    """Markdown: the mean score of the seeds at each evaluation, a row a dataset and method."""
    text = ["| log | method | mean score after a quarter, half, three quarters and all updates |"]
    text.append("|---|---|---|")
    groups: dict[tuple[str, str], list[Any]] = {}
    for each in content["cells"]:
        groups.setdefault((each["log"], each["method"]), []).append(each["curve"])
    for (name, method), curves in sorted(groups.items(), key=_place):
        scores = np.array([[point[2] for point in curve] for curve in curves]).mean(0)
        cells = ", ".join(f"{score:.1f}" for score in scores)
        text.append(f"| {name} | {method} | {cells} |")
    return "\n".join(text)


def settings_table(content: Mapping[str, Any]) -> str:
    """Markdown: what each library was given, with its versions; logs with the same share a row."""
    text = ["| method | logs | settings | versions |", "|---|---|---|---|"]
    rows: dict[tuple[str, str, str], list[str]] = {}
    keys = [(name, method) for name, methods in content["settings"].items() for method in methods]
    for name, method in sorted(keys, key=lambda key: _place((key, None))[::-1]):
        about = content["settings"][name][method]
        shown = {k: v for k, v in about["settings"].items() if k in SHOWN or method not in OWN}
        cells = ", ".join(f"{key} {_short(value)}" for key, value in shown.items())
        versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
        rows.setdefault((method, cells, versions), []).append(name)
    for (method, cells, versions), names in rows.items():
        text.append(f"| {method} | {', '.join(names)} | {cells} | {versions} |")
    return "\n".join(text)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")


def _place(group: tuple[tuple[str, str], Any]) -> tuple[int, int]:
    (name, method), _ = group
    return list(LOGS).index(name), CONTINUOUS.index(method)


def tutorial_table(content: Mapping[str, Any]) -> str:
    """Markdown: what minari_tutorial.py wrote, a row a variant."""
    text = [
        "| | largest value of an observation in a batch | mean return at each evaluation | last |"
    ]
    text.append("|---|---:|---|---:|")
    for line in content["variants"]:
        points = zip(line["updates"], line["returns"], strict=True)
        returns = ", ".join(f"{value:.0f} after {updates:,}" for updates, value in points)
        largest = line["largest_value_of_a_batch"]["observation"]
        text.append(
            f"| {line['variant']} | {largest:.3g} | {returns} | {line['final_return']:.0f} |"
        )
    return "\n".join(text)


def corl_table(content: Mapping[str, Any]) -> str:
    """Markdown: what compare_corl.py wrote: the largest differences of weights, a row a point."""
    names = [name for name, found in content.items() if "differences" in found]
    text = [f"| updates | {' | '.join(names)} | CORL's code against itself, disturbed |"]
    text.append("|---:" * (len(names) + 2) + "|")
    for updates in content[names[0]]["differences"]:
        found = {
            kind: [max(content[name][kind][updates].values()) for name in names]
            for kind in ("differences", "disturbed")
        }
        cells = [f"{value:.0e}" for value in (*found["differences"], min(found["disturbed"]))]
        text.append("| " + " | ".join([f"{int(updates):,}", *cells]) + " |")
    return "\n".join(text)


def reference_table() -> str:
    """Markdown: the returns of score 0 and 100 of every log for which the package knows them."""
    text = ["| log | score 0 | score 100 | from |", "|---|---:|---:|---|"]
    rows = [(name, r.reference_scores, "its recipe") for name, r in BUILTIN.items()]
    rows += [(f'reference_scores="{n}"', pair, "D4RL") for n, pair in REFERENCE_RETURNS.items()]
    for name, pair, source in rows:
        text.append(f"| `{name}` | {pair[0]:.6g} | {pair[1]:.6g} | {source} |")
    return "\n".join(text)


def write_page(page: Path, result: str) -> None:
    """The tables between their markers in ``page``; those whose result file is missing stay."""
    makers = [
        ("scores table", result, table),
        ("long table", f"{result}_50k", table),
        ("first table", f"{result}_replay_first", table),
        ("cost table", f"{result}_50k", cost_table),
        ("learning table", result, learning_table),
        ("settings table", result, settings_table),
        ("times table", f"{result}_time", times_table),
        ("tutorial table", "minari_tutorial", tutorial_table),
        ("corl table", "compare_corl", corl_table),
    ]
    names = {file for _, file, _ in makers} | {f"{result}_million{end}" for end in MILLION_SETTINGS}
    contents = {
        name: json.loads(path.read_text())
        for name in names
        if (path := RESULTS / f"{name}.json").is_file()
    }
    texts = {name: maker(contents[file]) for name, file, maker in makers if file in contents}
    long = {
        settings: contents[f"{result}_million{end}"]
        for end, settings in MILLION_SETTINGS.items()
        if f"{result}_million{end}" in contents
    }
    texts |= {"published table": published_table(long)} if long else {}
    for name, text in (texts | {"reference table": reference_table()}).items():
        replace_table(page, text, f"<!-- {name} -->", f"<!-- /{name} -->")


def main(arguments: Sequence[str] | None = None) -> None:
    o = _options(arguments)
    if o.page is not None:
        write_page(o.page, o.result)
    elif o.join:
        join(o.join, RESULTS / f"{o.result}.json")
    elif o.time:
        measure(o, RESULTS / f"{o.result}_time.json")
    else:
        run(o, RESULTS / f"{o.result}.json")
        print(table(read(RESULTS / f"{o.result}.json")))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--peers", type=Path, default=CACHE, help="folder of the environments and logs; may be new")
    add("--logs", nargs="+", choices=LOGS, default=list(PLAN))
    add("--methods", nargs="+", choices=CONTINUOUS, default=list(CONTINUOUS))
    add("--seeds", type=int, default=5)
    add("--updates", nargs="+", default=[], metavar="LOG=N", help="in place of those in LOGS")
    add("--corl", type=Path, metavar="FILE", help="CORL's iql.py; without it CORL is left out")
    add("--jobs", type=int, default=1, help="processes that train at the same time")
    add("--points", type=int, default=4, help="evaluations of each run; the last is its score")
    add("--result", default="scores", help="name of the result file")
    add(
        "--change", nargs="+", default=[], metavar="KEY=VALUE",
        help="other settings of ours; give --result too",
    )  # fmt: skip
    add("--join", nargs="+", default=[], metavar="NAME", help="result files whose cells are added")
    add("--time", action="store_true", help="measure times instead of scores")
    add("--block", type=int, default=100, help="of --time: updates between two changes")
    add("--rounds", type=int, default=11, help="of --time: blocks of each method")
    add("--forms", action="store_true", help="of --time: also ours compiled and captured")
    add("--page", type=Path, help="write the tables into this page, and train nothing")
    o = parser.parse_args(arguments)
    updates = {name: log.updates for name, log in LOGS.items()}
    for each in o.updates:
        name, _, number = each.partition("=")
        if name not in LOGS or not number.isdigit() or int(number) % CHUNK or int(number) == 0:
            parser.error(
                f"--updates {each}: expected LOG=N with a log of {', '.join(LOGS)} and a "
                f"multiple of {CHUNK}"
            )
        updates[name] = int(number)
    if min(o.seeds, o.jobs, o.points, o.rounds, o.block) < 1 or o.block % CAPTURED:
        parser.error(f"numbers must be at least 1, and --block a multiple of {CAPTURED}")
    o.updates = updates
    o.change = changes(o.change)
    return o


def changes(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of ``KEY=VALUE``."""
    return {key: _value(text) for key, _, text in (each.partition("=") for each in texts)}


def _value(text: str) -> Any:
    """A JSON value; other text is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
