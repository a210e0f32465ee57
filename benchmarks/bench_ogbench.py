"""Success rates on four tasks of OGBench, next to the published ones.

    python benchmarks/bench_ogbench.py --device cuda --compile --points 10
    python benchmarks/bench_ogbench.py --updates 100000 --width 256 --layers 2 --tasks cube-single

Each task and method is trained with several seeds as one population, and evaluated on ``--episodes``
episodes a seed. Seeds have batches of their own, or all the same where a chosen method has chunks of
actions (see ``batches_of``). The rows are made on this machine first where they are missing (about
half an hour to an hour a task); ``--draw v0`` takes the published files in OGBench's folder. Compared
are the dataset, cloning, IQL, IQL whose policy maximises Q with cloning (DDPG+BC), and the best of 32
actions of a flow that clones the dataset (IFQL). ``--methods IFQL "IFQL, chunks of 5"`` compares IFQL
with the same of five actions at once. Nothing is tuned here: settings and temperatures are those of the
published baselines (see ``BASE``, ``METHODS`` and ``TASKS``). Writes benchmarks/results/NAME.json after
each task and method. The table ends with what differs from the published protocol.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iql_torchrl import (
    PRESETS,
    IQLConfig,
    IQLPopulation,
    OfflineDataset,
    load_dataset,
)
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.report import text_table
from iql_torchrl.report.comparison import aggregate_table
from make_ogbench import ensure_ogbench
from record import RESULTS, place, save

import numpy as np

PAPER = 'Park, Li, Levine 2025, "Flow Q-Learning", table 3'
PUBLISHED = {"updates": 1_000_000, "width": 512, "layers": 4, "episodes": 50, "rows": 1_000_000}
EVALUATION_SEED = 10_000

#: The settings of the published IQL; ``config/iql_config.py`` has their sources.
BASE = PRESETS["ogbench"]
#: The same of the published IFQL, where they differ from those of IQL.
IFQL = {
    name: getattr(PRESETS["ifql"], name)
    for name, value in BASE.to_dict().items()
    if PRESETS["ifql"].to_dict()[name] != value
}
#: What differs from the published agents with all arguments.
ALWAYS_DIFFERENT = (
    "cloning, IQL: the policy's deviation is learned (published: 1)",
    "cloning, IQL, IQL+DDPG+BC: the policy's mean passes through tanh (published: clipped)",
    "IQL: advantages of the target critics (published: of the critics)",
    "orthogonal initial weights (published: variance scaling, uniform)",
)


@dataclass(frozen=True)
class Task:
    """One task: its rows and number, the temperature of IQL, and the success in % by method."""

    rows: str
    number: int
    temperature: float
    published: Mapping[str, int]

    def source(self, draw: str) -> str:
        return f"ogbench/{self.rows}-singletask-task{self.number}-{draw}"

    def made(self) -> str:
        return f"{self.rows}-local"


#: Temperatures: cube-single 1 (README.md of github.com/chongyi-zheng/infom), scene and puzzle-3x3 10
#: (README.md of github.com/chongyi-zheng/value-flows, for their image versions); puzzle-4x4 10, the
#: default of the published code.
TASKS = {
    "cube-single": Task("cube-single-play", 2, 1.0, {"IQL": 85, "IFQL": 73}),
    "puzzle-3x3": Task("puzzle-3x3-play", 1, 10.0, {"IQL": 33, "IFQL": 94}),
    "puzzle-4x4": Task("puzzle-4x4-play", 3, 10.0, {"IQL": 9, "IFQL": 50}),
    "scene": Task("scene-play", 3, 10.0, {"IQL": 32, "IFQL": 54}),
}


#: ``bc_weight``: OGBench trains its goal-conditioned IQL with DDPG+BC and alpha = 1 on all four
#: environments (``impls/hyperparameters.sh`` of github.com/seohongpark/ogbench at commit 1d41409,
#: ``agents/gciql.py``). There alpha multiplies minus the log-density of a Gaussian of deviation 1,
#: half the squared error; ``bc_weight`` multiplies the squared error, so it is alpha / 2. No DDPG+BC
#: was published for the single tasks. IFQL draws its noise in evaluation too, as published.
#: Chunks were not published with these tasks; h = 5 is the length of Li, Zhou, Levine 2025.
#: A further method is one more line, with any settings of ``IQLConfig``.
METHODS: dict[str, dict[str, Any]] = {
    "cloning": {"temperature": 0.0},
    "IQL": {},
    "IQL+DDPG+BC": {"policy": "deterministic", "actor_objective": "ddpg_bc", "bc_weight": 0.5},
    "IFQL": IFQL,
    "IFQL, chunks of 5": {**IFQL, "action_chunk": 5},
}
RANDOM = ("IFQL", "IFQL, chunks of 5")  # methods that are evaluated with random numbers
#: Those of a call without ``--methods``: all without chunks.
WITHOUT_CHUNKS = [name for name, settings in METHODS.items() if "action_chunk" not in settings]


def batches_of(methods: Sequence[str]) -> str:
    """``batches`` of all populations of a comparison: "own", or "shared" where a method has chunks.

    A population whose seeds have batches of their own has no chunks. Seeds that share batches differ in
    initial weights and in random numbers of losses and evaluation alone, and are less independent.
    """
    return "own" if set(methods) <= set(WITHOUT_CHUNKS) else "shared"


def configure(o: argparse.Namespace, task: Task, method: str) -> IQLConfig:
    """The settings of one method on one task, with seed 0."""
    general = {
        "updates": o.updates,
        "hidden": (o.width,) * o.layers,
        "device": o.device,
        "compile": o.compile,
        "temperature": task.temperature,
    }
    return replace(BASE, **{**general, **METHODS[method]})


def load(o: argparse.Namespace, task: Task) -> OfflineDataset:
    """The rows of ``task``, which are made first where ``o.draw`` is local and they are missing."""
    if o.draw == "local":
        ensure_ogbench(task.made(), episodes=o.made_episodes)
    return load_dataset(task.source(o.draw), reward=BASE.reward)


def of_the_log(dataset: OfflineDataset) -> float:
    """Share of the dataset's trajectories that complete the task at some step, in %."""
    rows = dataset.transitions
    done = rows["next", "terminated"].flatten().numpy()
    number = rows["collector", "traj_ids"].numpy()
    return 100 * len(np.unique(number[done])) / len(dataset.episode_lengths)


def run(o: argparse.Namespace, name: str, method: str, dataset: OfflineDataset) -> dict[str, Any]:
    """One method on one task: the curve of success rates in %, one of each seed."""
    config, curve = configure(o, TASKS[name], method), []
    configs = [replace(config, seed=seed) for seed in range(o.seeds)]
    population = IQLPopulation(configs, dataset, batches=batches_of(o.methods))
    how = {"episodes": o.episodes, "num_envs": o.envs, "deterministic": method not in RANDOM}
    for event in population.train(o.updates, every=o.updates // o.points):
        played = population.evaluate(dataset.make_env, seed=EVALUATION_SEED, **how)
        successes = [100 * float(each.successes.mean()) for each in played]
        curve.append({"updates": event.updates, "success": successes})
        shown = ", ".join(f"{each:.0f}" for each in successes)
        print(f"{name}, {method}, {event.updates:,} updates: success {shown} %", flush=True)
    return {
        "task": name,
        "method": method,
        "rows": len(dataset),
        "log": of_the_log(dataset),
        "config": config.to_dict(),
        "curve": curve,
    }


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a task and method: mean over seeds of the last success rate, Student's 95 % interval."""
    lines = []
    for each in runs:
        seeds = np.array(each["curve"][-1]["success"])
        _, low, high = (float(value) for value in mean_interval(seeds))
        lines.append(
            {
                "task": each["task"],
                "method": each["method"],
                "success": float(seeds.mean()),
                "interval": [max(0.0, low), min(100.0, high)],
                "seeds": seeds.tolist(),
                "log": each["log"],
                "published": TASKS[each["task"]].published.get(each["method"]),
            }
        )
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The summary as text; the dataset's rate is that of its own trajectories."""
    text = [["success in %", "here", "95 %", "published"]]
    for task in dict.fromkeys(line["task"] for line in lines):
        of_task = [line for line in lines if line["task"] == task]
        name = f"{task} task {TASKS[task].number}"
        text.append([f"{name}, the dataset", f"{of_task[0]['log']:.0f}", "", ""])
        for line in of_task:
            interval = "{:.0f} to {:.0f}".format(*line["interval"])
            published = str(line["published"] or "")
            cells = [f"{line['success']:.0f}", interval, published]
            text.append([f"{name}, {line['method']}", *cells])
    return text_table(text)


def differences(o: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs from the protocol of the published figures."""
    here = vars(o) | {"rows": runs[-1]["rows"]}
    lines = [f"{n}: {here[n]:,}, not {each:,}" for n, each in PUBLISHED.items() if here[n] != each]
    if o.draw == "local":
        lines.append(f"rows made on this machine with MuJoCo {version('mujoco')}: another draw")
    if batches_of(o.methods) == "shared":
        lines.append("all seeds of a method have the same batches (published: each its own)")
    return [*lines, *ALWAYS_DIFFERENT]


def compare(lines: Sequence[Mapping[str, Any]]) -> str:
    """Interquartile mean and probability of improvement, over the tasks that all methods have."""
    methods = dict.fromkeys(line["method"] for line in lines)
    seeds = {(line["method"], line["task"]): np.array(line["seeds"]) for line in lines}
    tasks = [t for t in TASKS if all(len(seeds.get((m, t), ())) > 1 for m in methods)]
    scores = {m: {t: seeds[m, t] for t in tasks} for m in methods}
    return aggregate_table(scores, name="success in %") if tasks else ""


def main(arguments: Sequence[str] | None = None) -> None:
    o = _options(arguments)
    # what decides a figure besides its task and method
    names = ("draw", "batches", "updates", "width", "layers", "episodes", "seeds", "points")
    settings = vars(o) | {"batches": batches_of(o.methods)}
    runs: list[dict[str, Any]] = []
    for name in o.tasks:
        dataset = load(o, TASKS[name])
        for method in o.methods:
            runs.append(run(o, name, method, dataset))
            content = {
                "paper": PAPER,
                "settings": {name: settings[name] for name in names},
                "differences": differences(o, runs),
                "summary": summarise(runs),
                "runs": runs,
            }
            save(place(o.result, folder=o.output), content, packages=["ogbench", "mujoco"])
    lines = summarise(runs)
    print(f"\n{table(lines)}\n\nPublished: {PAPER}. What differs:")
    print("\n".join(f"- {text}" for text in differences(o, runs)))
    if compared := compare(lines):
        print(f"\n{compared}")


def add_size_options(parser: argparse.ArgumentParser, *, layers: int, episodes: str) -> None:
    """Options of how much is made, trained and evaluated; ``episodes`` says of what they are."""
    add = parser.add_argument
    add("--seeds", type=int, default=3)
    add("--updates", type=int, default=1_000_000)
    add("--width", type=int, default=512)
    add("--layers", type=int, default=layers)
    add("--episodes", type=int, default=50, help=episodes)
    add("--points", type=int, default=1, help="evaluations during training; the last one counts")
    add("--envs", type=int, default=10, help="episodes at the same time")
    add("--made-episodes", type=int, default=1000, help="of rows that are made here")
    add("--compile", action="store_true")
    add("--output", type=Path, default=RESULTS, help="folder of the result file")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """``arguments`` with the options above; exits where these do not fit together."""
    o = parser.parse_args(arguments)
    if o.updates % o.points or o.seeds < 2:
        parser.error("--updates must be a multiple of --points, and --seeds at least 2")
    return o


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--methods", nargs="+", choices=METHODS, default=WITHOUT_CHUNKS)
    add_size_options(parser, layers=4, episodes="of each evaluation of a seed")
    add("--draw", default="local", help="local, or v0: the published files")
    add("--device", default="cpu")
    add("--result", default="ogbench", help="name of the result file")
    return parsed(parser, arguments)


if __name__ == "__main__":
    main()
