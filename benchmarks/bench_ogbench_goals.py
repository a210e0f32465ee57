"""Success rates of goal-conditioned IQL on a maze of OGBench, over its five goals.

    python benchmarks/bench_ogbench_goals.py --updates 20000 --width 128 --layers 2 --made-episodes 200

The rows of ``pointmaze-medium-navigate`` are made on this machine first where they are missing; their
rewards are not read. Several seeds are trained as one population on the same batches, and each is
evaluated on ``--episodes`` episodes of each of the tasks 1 to 5. Settings are those of OGBench's GCIQL,
except for the arguments. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench_ogbench import add_size_options, parsed
from iql_torchrl import PRESETS, IQLConfig, IQLPopulation, load_dataset
from iql_torchrl.data.dataset import RelabelledDataset
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.report import text_table
from make_ogbench import ensure_ogbench
from record import place, save

import numpy as np

ROWS = "pointmaze-medium-navigate"
ENVIRONMENT = "pointmaze-medium-v0"
GOALS = [{"task_id": number} for number in range(1, 6)]
EVALUATION_SEED = 10_000

#: ``impls/agents/gciql.py`` and ``impls/hyperparameters.sh`` of github.com/seohongpark/ogbench at
#: commit 1d41409: batches of 1,024, expectile 0.9, discount 0.99, DDPG+BC with alpha 0.003. Networks
#: and optimizer are those of the preset ``ogbench``. There alpha multiplies minus the log-density of a
#: Gaussian of deviation 1, half the squared error; ``bc_weight`` multiplies that error: alpha / 2.
SETTINGS: Mapping[str, Any] = {
    "batch_size": 1024,
    "expectile": 0.9,
    "discount": 0.99,
    "reward": "raw",
    "policy": "deterministic",
    "actor_objective": "ddpg_bc",
    "bc_weight": 0.003 / 2,
}


def configure(o: argparse.Namespace) -> IQLConfig:
    """The settings with seed 0."""
    size = {"updates": o.updates, "hidden": (o.width,) * o.layers, "batch_size": o.batch_size}
    return replace(PRESETS["ogbench"], **{**SETTINGS, **size, "compile": o.compile})


def load(o: argparse.Namespace) -> RelabelledDataset:
    """The rows with goals, which are made first where they are missing."""
    ensure_ogbench(f"{ROWS}-local", episodes=o.made_episodes)
    # the name of a task, whose rewards and environment are replaced
    log = load_dataset(f"ogbench/{ROWS}-singletask-task1-local", env=ENVIRONMENT, reward="raw")
    return log.relabelled(discount=SETTINGS["discount"])


def run(o: argparse.Namespace, config: IQLConfig, data: RelabelledDataset) -> list[dict[str, Any]]:
    """The curve of success rates in %: a list of one rate a goal, for each seed."""
    population = IQLPopulation([replace(config, seed=seed) for seed in range(o.seeds)], data)
    how = {"episodes": o.episodes * len(GOALS), "num_envs": o.envs, "goals": GOALS}
    curve = []
    for event in population.train(o.updates, every=o.updates // o.points):
        played = population.evaluate(data.make_env, seed=EVALUATION_SEED, **how)
        rates = [(100 * each.goal_success_rates).tolist() for each in played]
        curve.append({"updates": event.updates, "success": rates})
        shown = ", ".join(f"{np.mean(each):.0f}" for each in rates)
        print(f"{event.updates:,} updates: success {shown} %", flush=True)
    return curve


def summarise(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the last rates: means of goals and of seeds, and Student's 95 % interval over seeds."""
    rates = np.array(curve[-1]["success"])  # (seeds, goals)
    seeds = rates.mean(1)
    mean, low, high = (float(value) for value in mean_interval(seeds))
    return {
        "success": mean,
        "interval": [max(0.0, low), min(100.0, high)],
        "seeds": seeds.tolist(),
        "goals": rates.mean(0).tolist(),
    }


def table(summary: Mapping[str, Any]) -> str:
    """One line for each goal, and one for all."""
    rows = [["success in %", "here", "95 %"]]
    rows += [[f"task {n}", f"{rate:.0f}", ""] for n, rate in enumerate(summary["goals"], 1)]
    interval = "{:.0f} to {:.0f}".format(*summary["interval"])
    return text_table([*rows, ["all", f"{summary['success']:.0f}", interval]])


def main(arguments: Sequence[str] | None = None) -> None:
    o = _options(arguments)
    data, config = load(o), configure(o)
    curve = run(o, config, data)
    content = {
        "rows": len(data.dataset),
        "episodes": o.episodes,
        "seeds": o.seeds,
        "config": config.to_dict(),
        "summary": summarise(curve),
        "curve": curve,
    }
    save(place(o.result, folder=o.output), content, packages=["ogbench", "mujoco"])
    print(f"\n{table(content['summary'])}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_size_options(parser, layers=3, episodes="of each goal in an evaluation of a seed")
    parser.add_argument("--batch-size", type=int, default=SETTINGS["batch_size"])
    parser.add_argument("--result", default="ogbench_goals", help="name of the result file")
    return parsed(parser, arguments)


if __name__ == "__main__":
    main()
