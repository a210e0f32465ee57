"""Ways to extract a policy from IQL's critics, on Pendulum and PointMaze.

    python benchmarks/bench_policies.py
    python benchmarks/bench_policies.py --tasks pendulum --only-weights --bc-weights 0.003 0.01
    python benchmarks/bench_policies.py --only-flows --updates 5000 --seeds 5 --result policies_flows

Cloning and IQL with a Gaussian; DDPG+BC with the minimum or the mean of the online or of the target
critics, and two weights of cloning; a flow that clones, alone and with the best of 32 of its
actions by the online or the target critics, from fixed or fresh noise, and drawn by a softmax. The
policies of a line have the same critics' settings, updates and seeds, and the runs of a flow are
evaluated in all ways. Writes benchmarks/results/policies.json after each task.

With --only-flows: IQL with a Gaussian, weighted flow, the best of 32 of behaviour cloning, and a
conditioned flow at several values of guidance, each with its return, the value gap, and the time
of an action.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
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
from iql_torchrl.evaluation import value_gap
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.losses import LossCritics
from iql_torchrl.report import text_table
from record import place, save

import numpy as np
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_pointmaze import FIXED, fixed_goal

EVALUATION_SEED, CANDIDATES = 10_000, 32
#: name on the command line: (q_reduction, q_source) of DDPG+BC
VALUES = {
    f"{reduction}-{source}": (reduction, source)
    for source in ("online", "target")
    for reduction in ("min", "mean")
}
GUIDANCE = (0.0, 1.0, 2.0, 4.0)
Task = tuple[OfflineDataset, IQLConfig]


def pendulum() -> Task:
    config = replace(PRESETS["quick"], hidden=(64, 64))
    return load_dataset(ensure_dataset("pendulum/mixed-v0"), reward=config.reward), config


def pointmaze() -> Task:
    data, _ = fixed_goal(load_dataset(ensure_dataset("pointmaze/umaze-v0")), "umaze")
    return data, FIXED


TASKS = {"pendulum": pendulum, "pointmaze": pointmaze}


def train(
    o: argparse.Namespace, data: OfflineDataset, configs: list[IQLConfig], **settings: str
) -> Iterator[Any]:
    """The agents of all configs with all seeds, of one config after the other.

    ``settings`` are attributes of the policy's objective.
    """
    runs = [replace(each, seed=seed) for each in configs for seed in range(o.seeds)]
    population = IQLPopulation(runs, data)
    for name, value in settings.items():
        setattr(population.loss.actor_objective, name, value)
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
    online, targets = LossCritics(agent.loss), by_targets(agent.loss)
    best = f"flow, best of {CANDIDATES}"
    softmax = policies.best_of(
        agent.actor,
        online,
        CANDIDATES,
        select="softmax",
        temperature=agent.config.temperature or 1.0,
    )
    return {
        "flow": (agent.policy, False),
        best: (policies.best_of(agent.actor, online, CANDIDATES), True),
        f"{best}, fresh noise": (policies.best_of(agent.actor, online, CANDIDATES), False),
        f"{best}, target critics": (policies.best_of(agent.actor, targets, CANDIDATES), True),
        f"{best}, softmax": (softmax, False),
    }


def generative(
    o: argparse.Namespace, data: OfflineDataset, config: IQLConfig
) -> Iterator[tuple[str, Any, Any, bool]]:
    """Method, agent, policy, and whether it acts deterministically, of each seed."""
    flow = replace(config, policy="flow")
    clone = replace(flow, temperature=0.0)
    configs = {"IQL, Gaussian": config, "weighted flow": flow, "flow that clones": clone}
    for method, each in configs.items():
        for agent in train(o, data, [each]):
            yield method, agent, agent.policy, method == "IQL, Gaussian"
            if method != "IQL, Gaussian":
                yield f"{method}, deterministic", agent, agent.policy, True
            if each is clone:
                best = policies.best_of(agent.actor, LossCritics(agent.loss), CANDIDATES)
                yield f"best of {CANDIDATES} of it", agent, best, True
    for agent in train(o, data, [replace(flow, actor_objective="conditioned_flow")]):
        for w in GUIDANCE:
            policy = policies.guided(agent.policy, w)
            yield f"conditioned flow, w = {w:g}", agent, policy, False
            yield f"conditioned flow, w = {w:g}, deterministic", agent, policy, True


def milliseconds(policy: Any, data: OfflineDataset, rows: int, deterministic: bool) -> float:
    """Median time of a call on ``rows`` observations."""
    batch = data.transitions[:rows].select("observation")
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    taken = []
    with torch.no_grad(), set_exploration_type(kind):
        for _ in range(20):
            start = time.perf_counter()
            policy(batch.copy())
            taken.append(time.perf_counter() - start)
    return 1e3 * float(np.median(taken))


def run_flows(o: argparse.Namespace, name: str) -> dict[str, Any]:
    """One task: method -> mean return, value gap and times of each seed."""
    data, config = TASKS[name]()
    config = replace(config, updates=o.updates, compile=o.compile)
    scores: dict[str, list[float]] = {}
    gaps: dict[str, list[float]] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for method, agent, policy, deterministic in generative(o, data, config):
        how = {"deterministic": deterministic}
        episodes = {"episodes": o.episodes, "seed": EVALUATION_SEED}
        mean = float(evaluate(policy, data.make_env, **episodes, **how).returns.mean())
        critics = LossCritics(agent.loss)
        gap = value_gap(policy, data.transitions, critics=critics, rows=1024, **how).mean
        scores.setdefault(method, []).append(mean)
        gaps.setdefault(method, []).append(gap)
        spent = tuple(milliseconds(policy, data, rows, deterministic) for rows in (1, 256))
        times.setdefault(method, []).append(spent)
        print(f"{name}: {method}: {mean:.2f}, gap {gap:.2f}", flush=True)
    log = data.episode_returns.mean() if name != "pointmaze" else np.nan
    measured = {"scores": scores, "value_gaps": gaps, "milliseconds": times}
    return {"task": name, "log": float(log), "config": config.to_dict(), **measured}


def run(o: argparse.Namespace, name: str) -> dict[str, Any]:
    """All policies of one task: method -> mean return of each seed."""
    data, config = TASKS[name]()
    config = replace(config, updates=o.updates, compile=o.compile)
    scores: dict[str, list[float]] = {}

    def add(method: str, policy: Any, deterministic: bool = True) -> None:
        how = {"episodes": o.episodes, "seed": EVALUATION_SEED, "deterministic": deterministic}
        mean = float(evaluate(policy, data.make_env, **how).returns.mean())
        scores.setdefault(method, []).append(mean)
        print(f"{name}: {method}: {mean:.1f}", flush=True)

    if not o.only_weights:
        pair = [replace(config, temperature=0.0), config]
        for number, agent in enumerate(train(o, data, pair)):
            add(("cloning", "IQL")[number // o.seeds], agent.policy)
    ddpg = replace(config, policy="deterministic", actor_objective="ddpg_bc")
    for reduction, source in (VALUES[critics] for critics in o.critics):
        each = [replace(ddpg, bc_weight=weight) for weight in o.bc_weights]
        agents = train(o, data, each, q_reduction=reduction, q_source=source)
        for number, agent in enumerate(agents):
            weight = o.bc_weights[number // o.seeds]
            add(f"DDPG+BC, {reduction} of {source}, weight {weight}", agent.policy)
    flow = replace(config, policy="flow", temperature=0.0)
    for agent in () if o.only_weights else train(o, data, [flow]):
        for method, (policy, deterministic) in flow_policies(agent).items():
            add(method, policy, deterministic)
    log = data.episode_returns.mean() if name != "pointmaze" else np.nan
    return {"task": name, "log": float(log), "config": config.to_dict(), "scores": scores}


def table(tasks: list[dict[str, Any]]) -> str:
    """Mean return over seeds with Student's 95 % interval: a method a line, a task a column."""
    rows = [["", *(task["task"] for task in tasks)]]
    rows.append(["the dataset", *(f"{task['log']:.2f}" for task in tasks)])
    for method in tasks[0]["scores"]:
        means = [mean_interval(np.array(task["scores"][method])) for task in tasks]
        rows.append([method, *("{:.2f} ({:.2f} to {:.2f})".format(*each) for each in means)])
    if "value_gaps" in tasks[0]:
        rows[0] += [f"value gap, {task['task']}" for task in tasks] + ["ms, 1 and 256 states"]
        for row in rows[2:]:
            row += [f"{np.mean(task['value_gaps'][row[0]]):.2f}" for task in tasks]
            spent = np.median([task["milliseconds"][row[0]] for task in tasks], axis=(0, 1))
            row.append("{:.2f}, {:.1f}".format(*spent))
        rows[1] += [""] * (len(rows[0]) - len(rows[1]))
    return text_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--updates", type=int, default=10_000)
    add("--seeds", type=int, default=4)
    add("--episodes", type=int, default=20)
    add("--bc-weights", type=float, nargs="+", default=[0.5, 2.0], help="weights of DDPG+BC")
    add(
        "--critics",
        nargs="+",
        choices=VALUES,
        help="of DDPG+BC; all, with --only-weights min-online",
    )
    add("--only-weights", action="store_true", help="DDPG+BC alone")
    add("--only-flows", action="store_true", help="weighted, conditioned and best of N, with gaps")
    add("--compile", action="store_true")
    add("--threads", type=int, default=1)
    add("--result", default="policies")
    o = parser.parse_args()
    o.critics = o.critics or list(VALUES)[: 1 if o.only_weights else None]
    torch.set_num_threads(o.threads)
    tasks = []
    for name in o.tasks:
        tasks.append((run_flows if o.only_flows else run)(o, name))
        save(place(o.result), {"episodes": o.episodes, "tasks": tasks})
    print(f"\n{table(tasks)}")


if __name__ == "__main__":
    main()
