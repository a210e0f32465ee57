"""Success rates on tasks of OGBench, next to the published ones.

    python benchmarks/bench_ogbench.py --device cuda --compile --points 10
    python benchmarks/bench_ogbench.py --updates 100000 --width 256 --layers 2 --tasks cube-single
    python benchmarks/bench_ogbench.py --tasks goals --layers 3 --result ogbench_goals

The rows are made on this machine first where they are missing (about half an hour to an hour a task);
``--draw v0`` takes the published files in OGBench's folder. Compared are the dataset, cloning, IQL, IQL
whose policy maximises Q with cloning (DDPG+BC), and the best of 32 actions of a flow that clones the
dataset (IFQL). ``--methods IFQL "IFQL, chunks of 5"`` compares IFQL with the same of five actions at
once. Nothing is tuned here: settings and temperatures are those of the published baselines. Seeds have
batches of their own, or all the same where actions come in chunks (see ``batches_of``). The table ends
with what differs from the published protocol.

``--tasks goals`` is goal-conditioned IQL on ``pointmaze-medium-navigate``, whose rewards are not read:
``--episodes`` of each of the five goals, and all seeds on the same batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from iql_torchrl import PRESETS, Agent, IQLConfig, OfflineDataset, load_dataset
from iql_torchrl.report.comparison import aggregate_table
from make_ogbench import ensure_ogbench
from study import Row, Settings, Task, make_parser, play, run

import numpy as np

PAPER = 'Park, Li, Levine 2025, "Flow Q-Learning", table 3'
PUBLISHED = {
    "updates": 1_000_000, "width": 512, "layers": 4, "episodes": 50, "made_episodes": 1000,
}  # fmt: skip
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
GOALS = [{"task_id": number} for number in range(1, 6)]


@dataclass(frozen=True)
class SingleTask:
    """One task: its rows and number, the temperature of IQL, and the success in % by method."""

    rows: str
    number: int
    temperature: float
    published: Mapping[str, int]


#: Temperatures: cube-single 1 (README.md of github.com/chongyi-zheng/infom), scene and puzzle-3x3 10
#: (README.md of github.com/chongyi-zheng/value-flows, for their image versions); puzzle-4x4 10, the
#: default of the published code.
SINGLE_TASKS = {
    "cube-single": SingleTask("cube-single-play", 2, 1.0, {"IQL": 85, "IFQL": 73}),
    "puzzle-3x3": SingleTask("puzzle-3x3-play", 1, 10.0, {"IQL": 33, "IFQL": 94}),
    "puzzle-4x4": SingleTask("puzzle-4x4-play", 3, 10.0, {"IQL": 9, "IFQL": 50}),
    "scene": SingleTask("scene-play", 3, 10.0, {"IQL": 32, "IFQL": 54}),
}

#: ``bc_weight``: OGBench trains its goal-conditioned IQL with DDPG+BC and alpha = 1 on all four
#: environments (``impls/hyperparameters.sh`` of github.com/seohongpark/ogbench at commit 1d41409,
#: ``agents/gciql.py``). There alpha multiplies minus the log-density of a Gaussian of deviation 1,
#: half the squared error; ``bc_weight`` multiplies the squared error, so it is alpha / 2. No DDPG+BC
#: was published for the single tasks. IFQL draws its noise in evaluation too, as published.
#: Chunks were not published with these tasks; h = 5 is the length of Li, Zhou, Levine 2025.
METHODS: dict[str, Settings] = {
    "cloning": {"temperature": 0.0},
    "IQL": {},
    "IQL+DDPG+BC": {"policy": "deterministic", "actor_objective": "ddpg_bc", "bc_weight": 0.5},
    "IFQL": IFQL,
    "IFQL, chunks of 5": {**IFQL, "action_chunk": 5},
}
#: Those of a call without ``--methods``: all without chunks.
WITHOUT_CHUNKS = [name for name, settings in METHODS.items() if "action_chunk" not in settings]
#: Of goal-conditioned IQL, from the same two files: DDPG+BC with alpha 0.003. Networks and optimizer
#: are those of the preset ``ogbench``.
GOAL_SETTINGS: Settings = {
    "batch_size": 1024,
    "expectile": 0.9,
    "discount": 0.99,
    "reward": "raw",
    "policy": "deterministic",
    "actor_objective": "ddpg_bc",
    "bc_weight": 0.003 / 2,
}


def batches_of(o: argparse.Namespace) -> str:
    """``batches`` of all populations of a comparison: "own", or "shared" with chunks or goals.

    A population whose seeds have batches of their own has no chunks. Seeds that share batches differ in
    initial weights and in random numbers of losses and evaluation alone, and are less independent.
    """
    return "own" if set(o.methods) <= set(WITHOUT_CHUNKS) and "goals" not in o.tasks else "shared"


def configure(o: argparse.Namespace, settings: Settings) -> IQLConfig:
    """The preset with ``settings`` and the sizes of the command line."""
    sizes = {"updates": o.updates, "hidden": (o.width,) * o.layers, "device": o.device}
    if o.batch_size:
        sizes["batch_size"] = o.batch_size
    return replace(BASE, **{**settings, **sizes})


def success_of_dataset(dataset: OfflineDataset) -> float:
    """Share of the dataset's trajectories that complete the task at some step, in %."""
    rows = dataset.transitions
    done = rows["next", "terminated"].flatten().numpy()
    number = rows["collector", "traj_ids"].numpy()
    return 100 * len(np.unique(number[done])) / len(dataset.episode_lengths)


def single_task(name: str, o: argparse.Namespace) -> Task:
    task = SINGLE_TASKS[name]
    if o.draw == "local":
        ensure_ogbench(f"{task.rows}-local", episodes=o.made_episodes)
    source = f"ogbench/{task.rows}-singletask-task{task.number}-{o.draw}"
    data = load_dataset(source, reward=BASE.reward)

    def scores(agent: Agent) -> Iterator[Row]:
        how = {"num_envs": o.envs, "deterministic": agent.config.policy != "flow"}
        yield {"success": 100 * float(play(agent.policy, data, o.episodes, **how).successes.mean())}

    published = {f"{m}, published": {"success": rate} for m, rate in task.published.items()}
    return Task(
        data=data,
        config=configure(o, {"temperature": task.temperature}),
        variants={method: METHODS[method] for method in o.methods},
        scores=scores,
        references={"the dataset": {"success": success_of_dataset(data)}, **published},
    )


def goal_task(o: argparse.Namespace) -> Task:
    rows = "pointmaze-medium-navigate"
    ensure_ogbench(f"{rows}-local", episodes=o.made_episodes)
    # the name of a task, whose rewards and environment are replaced
    source = f"ogbench/{rows}-singletask-task1-local"
    dataset = load_dataset(source, env="pointmaze-medium-v0", reward="raw")
    data = dataset.relabelled(discount=GOAL_SETTINGS["discount"])

    def scores(agent: Agent) -> Iterator[Row]:
        how = {"num_envs": o.envs, "goals": GOALS}
        rates = 100 * play(agent.policy, data, o.episodes * len(GOALS), **how).goal_success_rates
        yield from ({"goal": number, "success": float(r)} for number, r in enumerate(rates, 1))
        yield {"goal": "all", "success": float(rates.mean())}

    config = configure(o, GOAL_SETTINGS)
    return Task(data=data, config=config, variants={"goal-conditioned IQL": {}}, scores=scores)


TASKS = {**{name: partial(single_task, name) for name in SINGLE_TASKS}, "goals": goal_task}


def differences(o: argparse.Namespace) -> list[str]:
    """What differs from the protocol of the published figures."""
    here = vars(o)
    lines = [f"{n}: {here[n]:,}, not {each:,}" for n, each in PUBLISHED.items() if here[n] != each]
    if o.draw == "local":
        lines.append(f"rows made on this machine with MuJoCo {version('mujoco')}: another draw")
    if batches_of(o) == "shared":
        lines.append("all seeds of a method have the same batches (published: each its own)")
    return [*lines, *ALWAYS_DIFFERENT]


def compare(rows: Sequence[Row]) -> str:
    """Interquartile mean and probability of improvement, over the tasks that all methods have."""
    last: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["variant"] in METHODS:
            last.setdefault((row["variant"], row["task"]), {})[row["seed"]] = row["success"]
    methods = dict.fromkeys(method for method, _ in last)
    tasks = [t for t in TASKS if all(len(last.get((m, t), ())) > 1 for m in methods)]
    scores = {m: {t: np.array([*last[m, t].values()]) for t in tasks} for m in methods}
    return aggregate_table(scores, name="success in %") if methods and tasks else ""


def main(arguments: Sequence[str] | None = None) -> None:
    o = _options(arguments)
    more: dict[str, Any] = {"paper": PAPER, "differences": differences(o)}
    how: dict[str, Any] = {"keys": ("task", "variant", "goal"), "packages": ["ogbench", "mujoco"]}
    rows = run(o, TASKS, batches=batches_of(o), **how, **more)
    print(f"\nPublished: {PAPER}. What differs:")
    print("\n".join(f"- {text}" for text in differences(o)))
    if compared := compare(rows):
        print(f"\n{compared}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    sizes = {"seeds": 3, "updates": 1_000_000, "episodes": 50, "points": 1}
    parser = make_parser(__doc__, "ogbench", tasks=TASKS, **sizes)
    parser.set_defaults(tasks=list(SINGLE_TASKS))
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=WITHOUT_CHUNKS)
    add("--width", type=int, default=512)
    add("--layers", type=int, default=4)
    add("--batch-size", type=int, help="of a batch (the task's)")
    add("--envs", type=int, default=10, help="episodes at the same time")
    add("--made-episodes", type=int, default=1000, help="of rows that are made here")
    add("--draw", default="local", help="local, or v0: the published files")
    add("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
