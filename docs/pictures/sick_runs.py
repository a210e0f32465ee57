"""A healthy run and six sick ones: the pictures of docs/tuning.md.

    python docs/pictures/sick_runs.py          # three minutes on one core
    python docs/pictures/sick_runs.py --draw   # only draws the curves in sick_runs.json again

Five runs learn from the Pendulum dataset, two from CartPole episodes, and two from a problem of one
number, whose returns are exact. Each sick run differs from its healthy run in what RUNS says, and in
nothing else. Writes sick_runs.json and the pictures beside this file.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torchrl import logger

from iql_torchrl import (
    IQLConfig,
    OfflineDataset,
    OfflineTrainer,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.files import atomic_write

HERE = Path(__file__).parent
HEALTHY, SICK, DATASET = "0.6", "#D55E00", "#0072B2"
QUICK = IQLConfig(
    updates=2_500, hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3, discount=0.95,
    polyak=0.02,
)  # fmt: skip
CARTPOLE = replace(QUICK, updates=2_000, polyak=0.05, critic_lr=3e-3, value_lr=3e-3, reward="raw")
PUSH = replace(
    QUICK, updates=800, discount=0.9, policy="deterministic", actor_objective="ddpg_bc",
    bc_weight=4.0, schedule="constant", reward="raw",
)  # fmt: skip
REWARDS_TIMES = 1_000
LARGEST_FORCE = 0.3


# -- the datasets --------------------------------------------------------------------------------------


@cache
def pendulum(reward: Any = "return_range") -> OfflineDataset:
    return load_dataset(ensure_dataset("pendulum/mixed-v0"), reward=reward)


@cache
def cartpole_rows() -> dict[str, np.ndarray]:
    """100 episodes, in each of which a balancing controller acts in a part of the steps."""
    names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    env, generator = gymnasium.make("CartPole-v1"), np.random.default_rng(0)
    rows: dict[str, list[Any]] = {name: [] for name in (*names, "episode")}
    for episode in range(100):
        observation, _ = env.reset(seed=episode)
        competence, ended = generator.choice([0.0, 0.2, 0.4]), False
        while not ended:
            lean = observation @ [0.05, 0.1, 1.0, 0.5]
            acts = generator.random() < competence
            action = int(lean > 0) if acts else int(generator.integers(2))
            following, reward, terminated, truncated, _ = env.step(action)
            step = (observation, action, reward, following, terminated, truncated, episode)
            for name, value in zip(rows, step, strict=True):
                rows[name].append(value)
            observation, ended = following, terminated or truncated
    return {name: np.array(values) for name, values in rows.items()}


def cartpole(*, ends_lost: bool = False) -> OfflineDataset:
    rows = dict(cartpole_rows())
    if ends_lost:  # what a file with one column "done" becomes when it is read as a time limit
        rows["truncated"] = rows["terminated"] | rows["truncated"]
        rows["terminated"] = np.zeros_like(rows["terminated"])
    return load_dataset(rows, env="CartPole-v1")


class Push(gymnasium.Env):
    """Ten pushes. The reward is the force up to ``LARGEST_FORCE``; beyond it the object falls: -1."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), reward_of_force(float(action[0])), False, self.steps == 10, {}

    def observe(self):
        return self.np_random.uniform(-1, 1, 1).astype(np.float32)


def reward_of_force(force: float) -> float:
    return force if force <= LARGEST_FORCE else -1.0


def push() -> OfflineDataset:
    """200 episodes of careful pushes: the dataset has no force above ``LARGEST_FORCE``."""
    generator = np.random.default_rng(0)
    seen = generator.uniform(-1, 1, (200, 11, 1)).astype(np.float32)
    force = generator.uniform(-LARGEST_FORCE, LARGEST_FORCE, (200, 10, 1)).astype(np.float32)
    rows = {
        "observation": seen[:, :-1].reshape(-1, 1),
        "next_observation": seen[:, 1:].reshape(-1, 1),
        "action": force.reshape(-1, 1),
        "reward": force.reshape(-1),
        "terminated": np.zeros(2000, bool),
        "truncated": np.arange(2000) % 10 == 9,
    }
    return load_dataset(rows, env=Push)


# -- the runs --------------------------------------------------------------------------------------


def learn(config: IQLConfig, dataset: OfflineDataset) -> dict[str, Any]:
    """The curves of one run, as the trainer records them, and the mean return of the dataset."""
    torch.manual_seed(0)
    agent = make_agent(config, dataset)

    def evaluation() -> dict[str, float]:
        played = evaluate(agent.policy, dataset.make_env, episodes=8, seed=0)
        first = dataset.transitions[:256]
        action = agent.policy(first.select(*agent.policy.in_keys))["action"].detach()
        return {
            "return_mean": float(played.returns.mean()),
            "action_mean": float(action.float().mean()),
        }

    trainer = OfflineTrainer(
        agent=agent, dataset=dataset, evaluation=evaluation, log_interval=config.updates // 50,
        eval_interval=config.updates // 10, progress_bar=False, seed=0,
    )  # fmt: skip
    trainer.train()
    return {"log": float(dataset.episode_returns.mean()), "rows": rounded(trainer.progress.rows)}


def rounded(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: float(f"{value:.4g}") for name, value in row.items()} for row in rows]


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "healthy": lambda: learn(QUICK, pendulum()),
    "values": lambda: learn(
        replace(
            QUICK,
            updates=1_500,
            expectile=0.99,
            discount=0.99,
            polyak=0.5,
            critic_lr=1e-2,
            value_lr=1e-2,
        ),
        pendulum(),
    ),
    "ceiling": lambda: learn(replace(QUICK, value_lr=1e-6), pendulum((0.67, 10.7))),
    "equal": lambda: learn(replace(QUICK, temperature=0.003), pendulum()),
    "scale": lambda: learn(QUICK, pendulum((REWARDS_TIMES, 0.0))),
    "healthy cartpole": lambda: learn(CARTPOLE, cartpole()),
    "ends": lambda: learn(CARTPOLE, cartpole(ends_lost=True)),
    "healthy push": lambda: learn(PUSH, push()),
    "outside": lambda: learn(replace(PUSH, bc_weight=0.0), push()),
}


# -- the pictures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One recorded metric. ``levels``: labelled level lines; ``scale``: of matplotlib."""

    metric: str
    scale: str = "linear"
    levels: tuple[tuple[str, float], ...] = ()
    limits: tuple[float, float] | None = None
    title: str | None = None


RETURN = Panel("return_mean", title="return in the environment")
#: picture: (healthy run, what its line is called, sick run, what its line is called, panels)
PICTURES: dict[str, tuple[str, str, str, str, tuple[Panel, ...]]] = {
    "sick_values": (
        "healthy", "healthy", "values", "values explode",
        (
            Panel("qvalue_mean", "symlog", (("largest possible value: 0", 0.0),)),
            Panel("td_error_mean", "log"),
            RETURN,
        ),
    ),
    "sick_ceiling": (
        "healthy", "healthy", "ceiling", "all weights at the ceiling",
        (
            Panel("clip_fraction", limits=(-0.03, 1.05)),
            Panel("advantage_mean", levels=(("0", 0.0),)),
            RETURN,
        ),
    ),
    "sick_equal": (
        "healthy", "healthy", "equal", "all weights equal",
        (
            Panel("effective_sample_size", levels=(("batch size: 256", 256.0),), limits=(0, 290)),
            Panel("weight_mean", levels=(("1", 1.0),)),
            RETURN,
        ),
    ),
    "sick_outside": (
        "healthy push", "healthy", "outside", "policy outside of the dataset",
        (
            Panel("policy_value_gap"),
            Panel("action_mean", title="mean action of the policy",
                  levels=((f"largest logged action: {LARGEST_FORCE}", LARGEST_FORCE),)),
            RETURN,
        ),
    ),
    "sick_ends": (
        "healthy cartpole", "healthy", "ends", "terminations lost",
        (
            Panel("qvalue_mean", levels=(("largest reward / (1 - discount)", 20.0),),
                  limits=(0, 23)),
            Panel("td_error_mean", "log"),
            RETURN,
        ),
    ),
    "sick_scale": (
        "healthy", "healthy", "scale", "rewards times 1,000",
        (
            Panel("td_error_mean", "log"),
            Panel("clip_fraction", limits=(-0.03, 1.05)),
            RETURN,
        ),
    ),
}  # fmt: skip
NORMAL = (
    RETURN,
    Panel("qvalue_mean"),
    Panel("td_error_mean", "log"),
    Panel("weight_mean"),
    Panel("clip_fraction", limits=(-0.03, 1.05)),
    Panel("effective_sample_size", levels=(("batch size: 256", 256.0),), limits=(0, 290)),
)


def curve(run: dict[str, Any], metric: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run["rows"] if math.isfinite(row.get(metric, math.nan))]
    return [row["update"] for row in rows], [row[metric] for row in rows]


def draw_panel(axes: Any, panel: Panel, lines: list[tuple[dict[str, Any], str, str]]) -> None:
    for run, colour, label in lines:
        axes.plot(*curve(run, panel.metric), color=colour, linewidth=2, label=label)
    levels = panel.levels
    if panel.metric == "return_mean":
        level = lines[0][0]["log"]
        levels = (
            (
                f"the dataset: {level:.0f}" if abs(level) > 10 else f"the dataset: {level:.2f}",
                level,
            ),
        )
    if panel.scale == "symlog":
        axes.set_yscale("symlog", linthresh=10)
    else:
        axes.set_yscale(panel.scale)
    for text, level in levels:
        axes.axhline(level, color=DATASET, linestyle="--", linewidth=1)
        axes.annotate(
            text, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 2), fontsize=8,
            textcoords="offset points", ha="right", color=DATASET,
        )  # fmt: skip
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    family = "monospace" if panel.title is None else None
    axes.set_title(panel.title or panel.metric, fontsize=10, loc="left", family=family)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("updates", fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw(
    name: str, panels: tuple[Panel, ...], lines: list[tuple[dict[str, Any], str, str]]
) -> None:
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(8.6, 0.35 + 2.35 * rows), layout="constrained", facecolor="white")
    for axes, panel in zip(figure.subplots(rows, 3).flat, panels, strict=True):
        draw_panel(axes, panel, lines)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=10
    )  # fmt: skip
    with atomic_write(HERE / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--draw", action="store_true", help="draw the recorded curves again")
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), help="make these runs again")
    options = parser.parse_args()
    logger.setLevel("ERROR")  # the reward scaling of "scale" is not the config's, on purpose
    record = HERE / "sick_runs.json"
    runs = json.loads(record.read_text()) if record.exists() else {}
    for name in [] if options.draw else options.only or RUNS:
        runs[name] = RUNS[name]()
        print(f"{name}: return {runs[name]['rows'][-1]['return_mean']:.1f}", flush=True)
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps(runs, default=float) + "\n")
    draw("healthy", NORMAL, [(runs["healthy"], "0.3", "a healthy run")])
    for name, (healthy, usual, sick, label, panels) in PICTURES.items():
        draw(name, panels, [(runs[healthy], HEALTHY, usual), (runs[sick], SICK, label)])


if __name__ == "__main__":
    main()
