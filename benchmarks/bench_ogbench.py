"""Success rates on four tasks of OGBench, next to the published ones.

    python benchmarks/bench_ogbench.py --device cuda --compile --points 10
    python benchmarks/bench_ogbench.py --updates 100000 --width 256 --layers 2 --tasks cube-single

Each task and method is trained with several seeds, as one population where the package allows it,
and evaluated on ``--episodes`` episodes a seed. The rows are made on this machine first where they
are missing (about an hour a task); ``--draw v0`` takes the published files in OGBench's folder.
Compared are the log, cloning, IQL, IQL whose policy maximises Q with cloning (DDPG+BC), and the
best of 32 actions of a flow that clones the log (IFQL). Nothing is tuned here: settings and
temperatures are those of the published baselines (see ``BASE``, ``METHODS`` and ``TASKS``). Writes
benchmarks/results/NAME.json after each task and method. The table ends with what differs from the
published protocol.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from iql_torchrl import (
    PRESETS,
    Evaluation,
    IQLConfig,
    IQLPopulation,
    OfflineDataset,
    OfflineTrainer,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.data.builtin import make_dataset
from iql_torchrl.data.builtin.ogbench import ogbench_path
from iql_torchrl.evaluation.statistics import mean_interval, wilson_interval
from iql_torchrl.report.comparison import aggregate_table
from record import RESULTS, save

import numpy as np

PAPER = 'Park, Li, Levine 2025, "Flow Q-Learning", table 3'
PUBLISHED_UPDATES, PUBLISHED_HIDDEN, PUBLISHED_ROWS = 1_000_000, (512,) * 4, 1_000_000
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
    """One task: its rows and number, the temperature of IQL, and the published success in %."""

    rows: str
    number: int
    temperature: float
    published: Mapping[str, int]

    def source(self, draw: str) -> str:
        return f"ogbench/{self.rows}-singletask-task{self.number}-{draw}"

    def made(self) -> str:
        return f"ogbench/{self.rows}-local"


def _published(iql: int, idql: int, ifql: int, fql: int) -> dict[str, int]:
    return {"IQL": iql, "IDQL": idql, "IFQL": ifql, "FQL": fql}


#: Temperatures: cube-single 1 (README.md of github.com/chongyi-zheng/infom), scene and puzzle-3x3 10
#: (README.md of github.com/chongyi-zheng/value-flows, for their image versions); puzzle-4x4 10, the
#: default of the published code.
TASKS = {
    "cube-single": Task("cube-single-play", 2, 1.0, _published(85, 96, 73, 97)),
    "puzzle-3x3": Task("puzzle-3x3-play", 1, 10.0, _published(33, 52, 94, 90)),
    "puzzle-4x4": Task("puzzle-4x4-play", 3, 10.0, _published(9, 34, 50, 18)),
    "scene": Task("scene-play", 3, 10.0, _published(32, 94, 54, 98)),
}


@dataclass(frozen=True)
class Method:
    """Settings on top of ``BASE`` and the task's temperature.

    ``published``: the entry of ``Task.published`` that this method is compared with.
    ``deterministic``: whether it is evaluated without random numbers.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    published: str | None = None
    deterministic: bool = True


#: ``bc_weight``: OGBench trains its goal-conditioned IQL with DDPG+BC and alpha = 1 on all four
#: environments (``impls/hyperparameters.sh`` of github.com/seohongpark/ogbench at commit 1d41409,
#: ``agents/gciql.py``). There alpha multiplies minus the log-density of a Gaussian of deviation 1,
#: half the squared error; ``bc_weight`` multiplies the squared error, so it is alpha / 2. No DDPG+BC
#: was published for the single tasks. IFQL draws its noise in evaluation too, as published.
#: A further method is one more line, with any settings of ``IQLConfig``.
METHODS = {
    "cloning": Method({"temperature": 0.0}),
    "IQL": Method(published="IQL"),
    "IQL+DDPG+BC": Method(
        {"policy": "deterministic", "actor_objective": "ddpg_bc", "bc_weight": 0.5}
    ),
    "IFQL": Method(IFQL, published="IFQL", deterministic=False),
}


def configure(o: argparse.Namespace, task: Task, method: Method) -> IQLConfig:
    """The settings of one method on one task, with seed 0."""
    general = {
        "updates": o.updates,
        "hidden": (o.width,) * o.layers,
        "device": o.device,
        "compile": o.compile,
        "temperature": task.temperature,
    }
    return replace(BASE, **{**general, **method.settings})


def load(o: argparse.Namespace, task: Task) -> OfflineDataset:
    """The rows of ``task``, which are made first where ``o.draw`` is local and they are missing."""
    if o.draw == "local" and not ogbench_path(task.made()).exists():
        make_dataset(task.made(), episodes=o.made_episodes)
    return load_dataset(task.source(o.draw), reward=BASE.reward)


def train(
    o: argparse.Namespace, config: IQLConfig, dataset: OfflineDataset, deterministic: bool
) -> Iterator[tuple[int, str, list[Evaluation]]]:
    """Updates, how the seeds are trained, and their evaluations, ``o.points`` times."""
    configs = [replace(config, seed=seed) for seed in range(o.seeds)]
    every = config.updates // o.points
    options: dict[str, Any] = {
        "episodes": o.episodes, "num_envs": o.envs, "seed": EVALUATION_SEED,
        "deterministic": deterministic,
    }  # fmt: skip
    if o.seeds > 1 and not o.alone:
        try:
            population = IQLPopulation(configs, dataset, batches="own")
        except ValueError as error:
            print(f"note: one seed after the other, because: {error}", flush=True)
        else:
            for event in population.train(every * o.points, every=every):
                yield event.updates, "population", population.evaluate(dataset.make_env, **options)
            return
    curves = [_train_alone(each, dataset, every, o.points, options) for each in configs]
    for number in range(o.points):
        yield every * (number + 1), "alone", [curve[number] for curve in curves]


def _train_alone(
    config: IQLConfig, dataset: OfflineDataset, every: int, points: int, options: Mapping[str, Any]
) -> list[Evaluation]:
    agent = make_agent(config, dataset)
    curve: list[Evaluation] = []

    def play() -> Evaluation:
        curve.append(evaluate(agent.policy, dataset.make_env, **options))
        return curve[-1]

    OfflineTrainer(
        agent=agent,
        dataset=dataset,
        total_updates=every * points,
        evaluation=play,
        eval_interval=every,
        evaluate_first=False,
        progress_bar=False,
    ).train()
    return curve


def of_the_log(dataset: OfflineDataset) -> float:
    """Share of the log's trajectories that complete the task at some step, in %."""
    rows = dataset.transitions
    done = rows["next", "terminated"].flatten().numpy()
    number = rows["collector", "traj_ids"].numpy()
    return 100 * len(np.unique(number[done])) / len(dataset.episode_lengths)


def run(o: argparse.Namespace, name: str, method: str, dataset: OfflineDataset) -> dict[str, Any]:
    """One method on one task: the curve of success rates in %, one of each seed."""
    config = configure(o, TASKS[name], METHODS[method])
    began, curve, trained = time.perf_counter(), [], ""
    for updates, how, evaluations in train(o, config, dataset, METHODS[method].deterministic):
        trained = how
        successes = [100 * float(each.successes.mean()) for each in evaluations]
        curve.append({"updates": updates, "success": successes})
        shown = ", ".join(f"{each:.0f}" for each in successes)
        print(f"{name}, {method}, {updates:,} updates: success {shown} %", flush=True)
    return {
        "task": name,
        "method": method,
        "trained": trained,
        "seconds": time.perf_counter() - began,
        "rows": len(dataset),
        "log": of_the_log(dataset),
        "config": config.to_dict(),
        "curve": curve,
    }


def summarise(runs: Sequence[Mapping[str, Any]], episodes: int) -> list[dict[str, Any]]:
    """One line a task and method: mean over seeds of the last success rate, with its interval.

    95 %: Student's t over seeds; of one seed Wilson's over its episodes.
    """
    lines = []
    for each in runs:
        seeds = np.array(each["curve"][-1]["success"])
        if len(seeds) > 1:
            _, low, high = (float(v) for v in mean_interval(seeds))
        else:
            rate = wilson_interval(round(float(seeds[0]) / 100 * episodes), episodes)
            low, high = (100 * bound for bound in rate)
        published = TASKS[each["task"]].published
        name = METHODS[each["method"]].published
        lines.append(
            {
                "task": each["task"],
                "method": each["method"],
                "success": float(seeds.mean()),
                "interval": [max(0.0, low), min(100.0, high)],
                "seeds": seeds.tolist(),
                "log": each["log"],
                "published": None if name is None else published[name],
                "published_others": {k: v for k, v in published.items() if k != name},
            }
        )
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The summary as text."""
    text = [f"{'success in %':31} {'here':>6} {'95 %':>14} {'published':>10}  published, others"]
    for task in dict.fromkeys(line["task"] for line in lines):
        of_task = [line for line in lines if line["task"] == task]
        name = f"{task} task {TASKS[task].number}"
        text.append(f"{name + ', the log':31} {of_task[0]['log']:6.0f}   (trajectories of its own)")
        for line in of_task:
            low, high = line["interval"]
            other = ", ".join(f"{k} {v}" for k, v in line["published_others"].items())
            published = "-" if line["published"] is None else line["published"]
            text.append(
                f"{name + ', ' + line['method']:31} {line['success']:6.0f} "
                f"{f'{low:.0f} to {high:.0f}':>14} {published:>10}  {other}"
            )
    return "\n".join(text)


def differences(o: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs from the protocol of the published figures."""
    lines = []
    if o.draw == "local":
        lines.append(f"rows made on this machine with MuJoCo {version('mujoco')}: another draw")
    rows = {each["rows"] for each in runs}
    if rows != {PUBLISHED_ROWS}:
        lines.append(f"{', '.join(f'{r:,}' for r in sorted(rows))} transitions, not 1,000,000")
    if o.updates != PUBLISHED_UPDATES:
        lines.append(f"{o.updates:,} updates, not {PUBLISHED_UPDATES:,}")
    if (o.width,) * o.layers != PUBLISHED_HIDDEN:
        lines.append(f"{o.layers} hidden layers of width {o.width}, not 4 of 512")
    if o.episodes != 50:
        lines.append(f"{o.episodes} episodes of evaluation, not 50")
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
    names = ("draw", "updates", "width", "layers", "episodes", "seeds", "points")
    runs: list[dict[str, Any]] = []
    for name in o.tasks:
        dataset = load(o, TASKS[name])
        for method in o.methods:
            runs.append(run(o, name, method, dataset))
            content = {
                "paper": PAPER,
                "settings": {name: getattr(o, name) for name in names},
                "differences": differences(o, runs),
                "summary": summarise(runs, o.episodes),
                "runs": runs,
            }
            save(RESULTS / f"{o.result}.json", content, packages=["ogbench", "mujoco"])
    lines = summarise(runs, o.episodes)
    print(f"\n{table(lines)}\n\nPublished: {PAPER}. What differs:")
    print("\n".join(f"- {text}" for text in differences(o, runs)))
    if compared := compare(lines):
        print(f"\n{compared}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=int, default=3)
    add("--updates", type=int, default=PUBLISHED_UPDATES)
    add("--width", type=int, default=512)
    add("--layers", type=int, default=4)
    add("--episodes", type=int, default=50, help="of each evaluation of a seed")
    add("--points", type=int, default=1, help="evaluations during training; the last one counts")
    add("--envs", type=int, default=10, help="episodes at the same time")
    add("--draw", default="local", help="local, or v0: the published files")
    add("--made-episodes", type=int, default=1000, help="of rows that are made here")
    add("--device", default="cpu")
    add("--compile", action="store_true")
    add("--alone", action="store_true", help="train one seed after the other")
    add("--result", default="ogbench", help="name of the result file")
    o = parser.parse_args(arguments)
    if o.updates % o.points or o.seeds < 1:
        parser.error("--updates must be a multiple of --points, and --seeds at least 1")
    return o


if __name__ == "__main__":
    main()
