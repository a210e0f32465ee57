"""Reach a distant corner of a maze by joining parts of drives that each cover only a part of the way.

In the log a point drives to one random target after another. Here the task is one fixed goal, far
from one fixed start, and the observation is position and velocity only: the log's targets are not
used, and every drive that passes within 1 of both start and goal is dropped. The remaining drives
connect start and goal only in parts. Cloning averages over the log's targets and turns back; dynamic
programming joins the parts.

The reward is 1 within 0.45 of the goal, where the episode ends, and 0 elsewhere. For training, 1 is
subtracted, so that values count the remaining steps. ``--task random`` keeps the log's own task: the
target is observed, and drawn again when reached, so that a return counts the targets reached in an
episode. For that task the log is nearly expert, and IQL gains little over cloning.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from iql_torchrl import PRESETS, IQLConfig, OfflineDataset, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin.recipes import import_for_recipe
from iql_torchrl.report import text_table, write_rows
from iql_torchrl.report.figures import save

import gymnasium
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from tqdm import tqdm

# (start, goal) as (row, column) of the maze's map
MAZES = {"umaze": ((1, 1), (3, 1)), "medium": ((1, 1), (6, 6))}
AT_GOAL, NEAR = 0.45, 1.0  # the environment's own radius, and that of passing a point
FIXED = replace(
    PRESETS["quick"],
    updates=5_000,
    hidden=(128, 128),
    polyak=0.05,  # values propagate through hundreds of backups, each with the target critics
    discount=0.995,  # 0.99 has a horizon of 100 steps; the way through the medium maze takes 300
    expectile=0.9,  # few of the log's actions lead to this goal: V must follow the best of them
    schedule="cosine",
    reward="minus_one",
)
# The log is good at this task, and advantages are fractions of a target instead of steps.
RANDOM = replace(FIXED, discount=0.99, expectile=0.7, temperature=10.0, reward="raw")


class FixedGoal(gymnasium.ObservationWrapper[Any, Any, Any]):
    """``start`` and ``goal`` cell fixed, goal unseen; ``paths`` keeps each episode's positions."""

    def __init__(self, env: gymnasium.Env, start: tuple[int, int], goal: tuple[int, int]) -> None:
        super().__init__(env)
        self.observation_space = env.observation_space["observation"]
        self.cells = {"reset_cell": np.array(start), "goal_cell": np.array(goal)}
        self.paths: list[list[np.ndarray]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.paths.append([])
        first = super().reset(seed=seed, options=self.cells)
        # The environment adds noise to the goal; the rewards were relabelled for the cell's centre.
        self.unwrapped.goal = self.unwrapped.maze.cell_rowcol_to_xy(self.cells["goal_cell"])
        return first

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        self.paths[-1].append(observation["achieved_goal"])
        return observation["observation"]


def fixed_goal(log: OfflineDataset, maze: str) -> tuple[OfflineDataset, dict[str, float]]:
    """The log relabelled for the fixed goal, without drives that join it to the start.

    Also the results of the complete log: the fraction of its episodes through the start that later
    reach the goal, and their mean number of steps.
    """
    spec = log.make_env().spec
    spec.kwargs |= {"reset_target": False, "continuing_task": False}

    def make_env() -> FixedGoal:
        return FixedGoal(gymnasium.make(spec), *MAZES[maze])

    plan = make_env().unwrapped.maze
    start, goal = (plan.cell_rowcol_to_xy(np.array(cell)) for cell in MAZES[maze])
    rows = log.transitions.numpy()
    before, after = rows["observation"], rows["next"]["observation"]
    to_start = np.linalg.norm(after["achieved_goal"] - start, axis=1)
    to_goal = np.linalg.norm(after["achieved_goal"] - goal, axis=1)
    at_goal = to_goal <= AT_GOAL
    ends = rows["next"]["truncated"].flatten()
    ends = ends | np.r_[np.diff(before["desired_goal"], axis=0).any(axis=1), True]
    drive = np.cumsum(ends) - ends
    complete = np.bincount(drive, to_start <= NEAR) * np.bincount(drive, to_goal <= NEAR) > 0
    print(f"dropped {complete.sum()} of {len(complete)} drives, which pass both start and goal")
    # Steps that begin inside the goal are dropped, because the episode ends there.
    outside = np.linalg.norm(before["achieved_goal"] - goal, axis=1) > AT_GOAL
    columns = {
        "observation": before["observation"],
        "next_observation": after["observation"],
        "action": rows["action"],
        "reward": at_goal.astype(np.float32),
        "terminated": at_goal,
        "truncated": ends & ~at_goal,
    }
    kept = {key: column[outside & ~complete[drive]] for key, column in columns.items()}
    passed, waits = 0, []
    for episode in np.split(np.arange(len(log)), np.cumsum(log.episode_lengths)[:-1]):
        if (passes := to_start[episode] <= NEAR).any():
            passed += 1
            waits += np.flatnonzero(at_goal[episode][passes.argmax() :])[:1].tolist()
    steps = np.mean(waits) if waits else np.nan
    fared = {"reached": len(waits) / max(1, passed), "steps": steps}
    return load_dataset(kept, env=make_env, reward=FIXED.reward), fared


def compare(maze: str, task: str, config: IQLConfig, episodes: int) -> tuple[list, dict, Any]:
    """Rows of the closing table, and the paths and the maze to draw."""
    log = load_dataset(ensure_dataset(f"pointmaze/{maze}-v0"))
    if task == "random":
        data = load_dataset(log.name, concatenate=["observation", "desired_goal"])
        rows, paths = [{"method": "log", "return": data.episode_returns.mean()}], {}
    else:
        data, fared = fixed_goal(log, maze)
        rows = [{"method": "log", **fared}]
        position = data.transitions["observation"][:, :2].numpy()
        paths = {"60 drives of the log": np.split(position, np.cumsum(data.episode_lengths))[:60]}
    data.print_notes()
    for method, temperature in (("cloning", 0.0), ("IQL", config.temperature)):
        agent = make_agent(replace(config, temperature=temperature), data)
        batches = data.device_sampler(config.batch_size, seed=config.seed)
        for _ in tqdm(range(config.updates), desc=method, unit="update", disable=None):
            agent.step(batches.sample())
        envs = [data.make_env() for _ in range(min(8, episodes))]
        played = evaluate(agent.policy, iter(envs).__next__, episodes=episodes, seed=10_000)
        paths[method] = [np.stack(path) for env in envs for path in getattr(env, "paths", [])]
        reached = played.returns > 0
        steps = played.lengths[reached].mean() if reached.any() else np.nan
        results = {"return": played.returns.mean(), "reached": reached.mean(), "steps": steps}
        rows.append({key: results.get(key, method) for key in rows[0]})
    return rows, paths, log.make_env().unwrapped.maze


def draw(path: Path, maze: str, plan: Any, paths: dict[str, list[np.ndarray]]) -> None:
    """Paths through the maze: parts of the log, then the paths of each policy from the start."""
    walls = np.array(plan.maze_map) == 1
    start, goal = (plan.cell_rowcol_to_xy(np.array(cell)) for cell in MAZES[maze])
    up, right = np.array(walls.shape) / 2
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, (method, lines) in zip(figure.subplots(1, 3), paths.items(), strict=True):
        axes.imshow(walls, cmap="binary", vmax=4, extent=(-right, right, -up, up))
        for line in lines:
            axes.plot(*line.T, linewidth=0.8, alpha=0.7)
        axes.add_patch(Circle(goal, AT_GOAL, color="tab:green", alpha=0.4, zorder=3))
        axes.plot(*start, "k^", markersize=7)
        axes.set(title=method, xticks=[], yticks=[])
    figure.suptitle(f"PointMaze {maze}: from the triangle to the green disc", fontsize=11)
    save(figure, path)


@cli.errors_in_one_line()
def main(
    maze: Literal["umaze", "medium"] = "umaze",
    task: Literal["fixed", "random"] = "fixed",
    updates: int = FIXED.updates,
    episodes: int = 20,
    seed: int = 0,
    output: Path = Path("runs"),
) -> None:
    """Train cloning and IQL in a maze, and compare them with the log.

    Args:
        maze: of D4RL.
        task: one far goal, or the log's own targets.
        updates: number of gradient updates.
        episodes: episodes of each evaluation.
        seed: seed of the initial weights and of the batches.
        output: where the results are written.
    """
    config = replace(FIXED if task == "fixed" else RANDOM, updates=updates, seed=seed)
    import_for_recipe("gymnasium_robotics", f"pointmaze/{maze}-v0")  # registers the mazes
    rows, paths, plan = compare(maze, task, config, episodes)
    folder = output / f"pointmaze-{maze}-{task}-seed{seed}"
    write_rows(folder / "metrics.csv", rows)
    cells = [[name, *(f"{n:.2f}" for n in numbers)] for name, *numbers in map(dict.values, rows)]
    print(text_table([list(rows[0]), *cells]))
    if task == "fixed":
        draw(folder / "paths.png", maze, plan, paths)
    print(f"\nWritten to {folder}/")


if __name__ == "__main__":
    tyro.cli(main)
