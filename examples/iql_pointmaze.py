"""Reach a distant corner of a maze by joining parts of drives that each cover only a part of the way.

In the dataset a point drives to one random target after another. Here the task is one fixed goal, far
from one fixed start, and the observation is position and velocity only: the dataset's targets are not
used, and every drive that passes within 1 of both start and goal is dropped. The remaining drives
connect start and goal only in parts. Cloning averages over its targets and turns back; dynamic
programming joins the parts.

The reward is 1 within 0.45 of the goal, where the episode ends, and 0 elsewhere. For training, 1 is
subtracted, so that values count the remaining steps.
"""

from dataclasses import replace
from typing import Any, Literal

from iql_torchrl import PRESETS, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin.recipes import import_for_recipe
from iql_torchrl.report import text_table

import gymnasium
import numpy as np
import tyro

# (start, goal) as (row, column) of the maze's map
MAZES = {"umaze": ((1, 1), (3, 1)), "medium": ((1, 1), (6, 6))}
AT_GOAL, NEAR = 0.45, 1.0  # the environment's own radius, and that of passing a point
FIXED = replace(
    PRESETS["quick"],
    updates=5_000,
    hidden=(128, 128),
    polyak=0.05,  # values propagate through hundreds of backups, each with the target critics
    discount=0.995,  # 0.99 has a horizon of 100 steps; the way through the medium maze takes 300
    expectile=0.9,  # few of the dataset's actions lead to this goal: V must follow the best of them
    schedule="cosine",
    reward="minus_one",
)


class FixedGoal(gymnasium.ObservationWrapper[Any, Any, Any]):
    """``start`` and ``goal`` cell fixed, goal unseen."""

    def __init__(self, env: gymnasium.Env, start: tuple[int, int], goal: tuple[int, int]) -> None:
        super().__init__(env)
        self.observation_space = env.observation_space["observation"]
        self.cells = {"reset_cell": np.array(start), "goal_cell": np.array(goal)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        first = super().reset(seed=seed, options=self.cells)
        # The environment adds noise to the goal; the rewards were relabelled for the cell's centre.
        self.unwrapped.goal = self.unwrapped.maze.cell_rowcol_to_xy(self.cells["goal_cell"])
        return first

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return observation["observation"]


def fixed_goal(dataset, maze):
    """The dataset relabelled for the fixed goal, without drives that join it to the start.

    Also the results of the complete dataset: the fraction of its episodes through the start that later
    reach the goal, and their mean number of steps.
    """
    spec = dataset.make_env().spec
    spec.kwargs |= {"reset_target": False, "continuing_task": False}

    def make_env() -> FixedGoal:
        return FixedGoal(gymnasium.make(spec), *MAZES[maze])

    plan = make_env().unwrapped.maze
    start, goal = (plan.cell_rowcol_to_xy(np.array(cell)) for cell in MAZES[maze])
    rows = dataset.transitions.numpy()
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
    for episode in np.split(np.arange(len(dataset)), np.cumsum(dataset.episode_lengths)[:-1]):
        if (passes := to_start[episode] <= NEAR).any():
            passed += 1
            waits += np.flatnonzero(at_goal[episode][passes.argmax() :])[:1].tolist()
    fared = {"reached": len(waits) / max(1, passed), "steps": np.mean(waits or [np.nan])}
    return load_dataset(kept, env=make_env, reward=FIXED.reward), fared


def learn(data, config, episodes):
    """Train cloning and IQL, and evaluate both."""
    played = {}
    for method, temperature in (("cloning", 0.0), ("IQL", config.temperature)):
        print(f"Training: {method}", flush=True)
        agent = make_agent(replace(config, temperature=temperature), data)
        batches = data.device_sampler(config.batch_size, seed=config.seed)
        OfflineTrainer(agent=agent, dataset=data, replay_buffer=batches).train()
        played[method] = evaluate(agent.policy, data.make_env, episodes=episodes, seed=10_000)
    return played


@cli.errors_in_one_line()
def main(
    maze: Literal["umaze", "medium"] = "umaze",
    updates: int = FIXED.updates,
    episodes: int = 20,
    seed: int = 0,
) -> None:
    """Train cloning and IQL in a maze, and compare them with the dataset.

    Args:
        maze: of D4RL.
        updates: number of gradient updates.
        episodes: episodes of each evaluation.
        seed: seed of the initial weights and of the batches.
    """
    config = replace(FIXED, updates=updates, seed=seed)
    import_for_recipe("gymnasium_robotics", f"pointmaze/{maze}-v0")  # registers the mazes
    data, of_dataset = fixed_goal(load_dataset(ensure_dataset(f"pointmaze/{maze}-v0")), maze)
    data.print_notes()
    table = [["", "reached the goal", "steps"]]
    table.append(["dataset", f"{of_dataset['reached']:.0%}", f"{of_dataset['steps']:.0f}"])
    for method, played in learn(data, config, episodes).items():
        reached = played.returns > 0
        steps = f"{played.lengths[reached].mean():.0f}" if reached.any() else "-"
        table.append([method, f"{reached.mean():.0%}", steps])
    print(f"\n{text_table(table)}")


if __name__ == "__main__":
    tyro.cli(main)
