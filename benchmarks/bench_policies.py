"""Ways to extract a policy from IQL's critics, on the older benchmarks of this package.

    python benchmarks/bench_policies.py
    python benchmarks/bench_policies.py --tasks halfcheetah --halfcheetah FILE.npz --updates 20000

Cloning and IQL with a Gaussian; DDPG+BC with the minimum or the mean of the live or of the target
critics, and two weights of cloning; a flow that clones, alone and with the best of 32 of its actions
by the live or the target critics, from fixed or fresh noise, and drawn by a softmax. The policies of a
line have the same critics' settings, updates and seeds, and the runs of a flow are evaluated in all
ways. Writes benchmarks/results/policies.json after each task.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from iql_torchrl import (
    PRESETS,
    IQLConfig,
    IQLPopulation,
    OfflineDataset,
    evaluate,
    load_dataset,
    policies,
)
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.losses import LossCritics
from record import RESULTS, save

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_pointmaze import FIXED, fixed_goal

EVALUATION_SEED, CANDIDATES = 10_000, 32
#: name on the command line: (q_reduction, q_source) of DDPG+BC
VALUES = {
    f"{reduction}-{source}": (reduction, source)
    for source in ("live", "target")
    for reduction in ("min", "mean")
}
Task = tuple[OfflineDataset, IQLConfig]


def pendulum(o: argparse.Namespace) -> Task:
    config = replace(PRESETS["quick"], hidden=(64, 64))
    return load_dataset(ensure_dataset("pendulum/mixed-v0"), reward=config.reward), config


def pointmaze(o: argparse.Namespace) -> Task:
    data, _ = fixed_goal(load_dataset(ensure_dataset("pointmaze/umaze-v0")), "umaze")
    return data, FIXED


def halfcheetah(o: argparse.Namespace) -> Task:
    config = PRESETS["locomotion"]
    env = "HalfCheetah-v5"
    return load_dataset(str(o.halfcheetah), env=env, reward=config.reward), config


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "pendulum": pendulum,
    "pointmaze": pointmaze,
    "halfcheetah": halfcheetah,
}


def train(
    o: argparse.Namespace, data: OfflineDataset, configs: list[IQLConfig], **knobs: str
) -> Iterator[Any]:
    """The agents of all configs with all seeds, of one config after the other."""
    runs = [replace(each, seed=seed) for each in configs for seed in range(o.seeds)]
    population = IQLPopulation(runs, data)
    for name, value in knobs.items():
        setattr(population.loss, name, value)
    for _ in population.train(o.updates, every=o.updates):
        pass
    return (population.member(number) for number in range(len(runs)))


def by_targets(loss: Any) -> LossCritics:
    """The target critics of ``loss``, as they are."""
    frozen = copy.deepcopy(loss)
    frozen.qvalue_network_params.data.copy_(frozen.target_qvalue_network_params.data)
    return LossCritics(frozen)


def flow_policies(agent: Any) -> dict[str, tuple[Any, bool]]:
    """Ways of acting with one trained flow: the policy, and whether it acts deterministically."""
    live, targets = LossCritics(agent.loss), by_targets(agent.loss)
    best = f"flow, best of {CANDIDATES}"
    softmax = policies.best_of(
        agent.actor, live, CANDIDATES, select="softmax", temperature=agent.config.temperature or 1.0
    )
    return {
        "flow": (agent.policy, False),
        best: (policies.best_of(agent.actor, live, CANDIDATES), True),
        f"{best}, fresh noise": (policies.best_of(agent.actor, live, CANDIDATES), False),
        f"{best}, target critics": (policies.best_of(agent.actor, targets, CANDIDATES), True),
        f"{best}, softmax": (softmax, False),
    }


def returns(o: argparse.Namespace, data: OfflineDataset, policy: Any, deterministic: bool) -> float:
    played = evaluate(
        policy,
        data.make_env,
        episodes=o.episodes,
        seed=EVALUATION_SEED,
        deterministic=deterministic,
    )
    return float(played.returns.mean())


def add_regressions(
    o: argparse.Namespace, data: OfflineDataset, config: IQLConfig, add: Callable[[str, Any], None]
) -> None:
    """Cloning and IQL: weighted regression with two temperatures, as one population."""
    for number, agent in enumerate(train(o, data, [replace(config, temperature=0.0), config])):
        add(("cloning", "IQL")[number // o.seeds], agent.policy)


def run(o: argparse.Namespace, name: str) -> dict[str, Any]:
    """All policies of one task: method -> mean return of each seed."""
    data, config = TASKS[name](o)
    config = replace(config, updates=o.updates, compile=o.compile)
    scores: dict[str, list[float]] = {}
    began = time.perf_counter()

    def add(method: str, policy: Any, deterministic: bool = True) -> None:
        scores.setdefault(method, []).append(returns(o, data, policy, deterministic))

    def show(methods: list[str]) -> None:
        for method in methods:
            values = " ".join(f"{value:.1f}" for value in scores[method])
            seconds = time.perf_counter() - began
            print(f"{name}: {method}: {np.mean(scores[method]):.1f} ({values}), {seconds:.0f} s")
        sys.stdout.flush()

    if not o.only_weights:
        add_regressions(o, data, config, add)
        show(["cloning", "IQL"])
    ddpg = replace(config, policy="deterministic", actor_objective="ddpg_bc")
    for reduction, source in (VALUES[critics] for critics in o.critics):
        each = [replace(ddpg, bc_weight=weight) for weight in o.bc_weights]
        methods = [f"DDPG+BC, {reduction} of {source}, weight {weight}" for weight in o.bc_weights]
        agents = train(o, data, each, q_reduction=reduction, q_source=source)
        for number, agent in enumerate(agents):
            add(methods[number // o.seeds], agent.policy)
        show(methods)
    flow = replace(config, policy="flow", temperature=0.0)
    known = list(scores)
    for agent in () if o.only_weights else train(o, data, [flow]):
        for method, (policy, deterministic) in flow_policies(agent).items():
            add(method, policy, deterministic)
    show([method for method in scores if method not in known])
    log = data.episode_returns if name != "pointmaze" else np.array([np.nan])
    return {
        "task": name,
        "rows": len(data),
        "log": float(log.mean()),
        "config": config.to_dict(),
        "scores": scores,
        "seconds": time.perf_counter() - began,
    }


def table(tasks: list[dict[str, Any]]) -> str:
    """Mean return over seeds with Student's 95 % interval: a method a line, a task a column."""
    lines = [f"{'':44}" + "".join(f"{task['task']:>28}" for task in tasks)]
    lines.append(f"{'the log':44}" + "".join(f"{task['log']:28.2f}" for task in tasks))
    for method in tasks[0]["scores"]:
        text = f"{method:44}"
        for task in tasks:
            mean, low, high = mean_interval(np.array(task["scores"][method]))
            text += f"{f'{mean:.2f} ({low:.2f} to {high:.2f})':>28}"
        lines.append(text)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--tasks", default="pendulum,pointmaze", help=", ".join(TASKS))
    add("--halfcheetah", type=Path, help="file of HalfCheetah's log")
    add("--updates", type=int, default=10_000)
    add("--seeds", type=int, default=4)
    add("--episodes", type=int, default=20)
    add("--bc-weights", type=float, nargs="+", default=[0.5, 2.0], help="weights of DDPG+BC")
    add(
        "--critics", nargs="+", choices=VALUES, help="of DDPG+BC; all, with --only-weights min-live"
    )
    add("--only-weights", action="store_true", help="DDPG+BC alone")
    add("--compile", action="store_true")
    add("--threads", type=int, default=1)
    add("--result", default="policies")
    o = parser.parse_args()
    o.tasks = o.tasks.split(",")
    if unknown := set(o.tasks) - set(TASKS):
        parser.error(f"--tasks has {sorted(unknown)}; there are {list(TASKS)}.")
    o.critics = o.critics or list(VALUES)[: 1 if o.only_weights else None]
    torch.set_num_threads(o.threads)
    tasks = []
    for name in o.tasks:
        tasks.append(run(o, name))
        save(RESULTS / f"{o.result}.json", {"episodes": o.episodes, "tasks": tasks})
    print(f"\n{table(tasks)}")


if __name__ == "__main__":
    main()
