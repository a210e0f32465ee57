"""Ways to extract a policy from IQL's critics, on Pendulum and PointMaze.

    python benchmarks/bench_policies.py
    python benchmarks/bench_policies.py --tasks pendulum --only DDPG --bc-weights 0.003 0.01
    python benchmarks/bench_policies.py --only-flows --updates 5000 --seeds 5 --result policies_flows

Cloning and IQL with a Gaussian; DDPG+BC with the minimum or the mean of the online or of the target
critics, and several weights of cloning; a flow that clones, alone and with the best of 32 of its
actions by the online or the target critics, from fixed or fresh noise, and drawn by a softmax. Each
variant has the same critics' settings, updates and seeds, and the agents of a flow act in all ways.

With --only-flows: IQL with a Gaussian, weighted flow, the best of 32 of behaviour cloning, and a
conditioned flow at several values of guidance, each with its return, the value gap, and the time of an
action for 1 and 256 states.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from iql_torchrl import Agent, OfflineDataset, policies
from iql_torchrl.evaluation import value_gap
from iql_torchrl.losses import LossCritics
from study import (
    Row,
    Settings,
    Task,
    make_parser,
    mean_return,
    milliseconds,
    pendulum,
    pointmaze,
    returns_task,
    run,
)

import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

CANDIDATES = 32
#: name on the command line: attributes of DDPG+BC
CRITICS = {
    f"{reduction}-{source}": {"q_reduction": reduction, "q_source": source}
    for source in ("online", "target")
    for reduction in ("min", "mean")
}
GUIDANCE = (0.0, 1.0, 2.0, 4.0)
FLOW: Settings = {"policy": "flow"}
CLONE: Settings = {"policy": "flow", "temperature": 0.0}
FLOWS: Mapping[str, Settings] = {
    "IQL, Gaussian": {},
    "weighted flow": FLOW,
    "flow that clones": CLONE,
    "conditioned flow": {**FLOW, "actor_objective": "conditioned_flow"},
}
Way = tuple[str, Any, bool]  # name, policy, and whether it acts deterministically


def extractions(o: argparse.Namespace) -> dict[str, Settings]:
    """The variants without ``--only-flows``."""
    ddpg = {"policy": "deterministic", "actor_objective": "ddpg_bc"}
    variants: dict[str, Settings] = {"cloning": {"temperature": 0.0}, "IQL": {}}
    for critics in o.critics:
        for weight in o.bc_weights:
            name = f"DDPG+BC, {critics.replace('-', ' of ')}, weight {weight}"
            variants[name] = {**ddpg, "bc_weight": weight, **CRITICS[critics]}
    return variants | {"flow": CLONE}


def by_targets(loss: Any) -> LossCritics:
    """The target critics of ``loss``, as they are."""
    frozen = copy.deepcopy(loss)
    frozen.qvalue_network_params.data.copy_(frozen.target_qvalue_network_params.data)
    return LossCritics(frozen)


def ways_to_act(agent: Agent) -> Iterator[Way]:
    """Those of an agent without ``--only-flows``."""
    if agent.config.policy != "flow":
        yield "", agent.policy, True
        return
    online, targets = LossCritics(agent.loss), by_targets(agent.loss)
    best = partial(policies.best_of, agent.actor, num_samples=CANDIDATES)
    yield "", agent.policy, False
    yield f"best of {CANDIDATES}", best(online), True
    yield f"best of {CANDIDATES}, fresh noise", best(online), False
    yield f"best of {CANDIDATES}, target critics", best(targets), True
    softmax = best(online, select="softmax", temperature=agent.config.temperature or 1.0)
    yield f"best of {CANDIDATES}, softmax", softmax, False


def ways_of_flows(agent: Agent) -> Iterator[Way]:
    """Those of an agent with ``--only-flows``."""
    policy, config = agent.policy, agent.config
    if config.policy != "flow":
        yield "", policy, True
        return
    acting = {"": policy}
    if config.actor_objective == "conditioned_flow":
        acting = {f"w = {w:g}": policies.guided(policy, w) for w in GUIDANCE}
    for name, each in acting.items():
        yield name, each, False
        yield ", ".join([name] * bool(name) + ["deterministic"]), each, True
    if config.temperature == 0:
        best = policies.best_of(agent.actor, LossCritics(agent.loss), CANDIDATES)
        yield f"best of {CANDIDATES}", best, True


def act_time(policy: Any, data: OfflineDataset, states: int, deterministic: bool) -> float:
    batch = data.transitions[:states].select("observation")
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with torch.no_grad(), set_exploration_type(kind):
        return milliseconds(lambda: policy(batch.copy()))


def scores(agent: Agent, data: OfflineDataset, o: argparse.Namespace) -> Iterator[Row]:
    for way, policy, deterministic in (ways_of_flows if o.only_flows else ways_to_act)(agent):
        how = {"deterministic": deterministic}
        row: Row = {"way": way, "return": mean_return(policy, data, o.episodes, **how)}
        if o.only_flows:
            critics = LossCritics(agent.loss)
            gap = value_gap(policy, data.transitions, critics=critics, rows=1024, **how)
            times = {f"ms {n}": act_time(policy, data, n, deterministic) for n in (1, 256)}
            row |= {"value gap": gap.mean, **times}
        yield row


def task_of(make: Any, o: argparse.Namespace) -> Task:
    data, config = make()
    variants = FLOWS if o.only_flows else extractions(o)
    task = returns_task(data, config, variants, o.episodes)
    # the dataset of PointMaze has another task
    references = task.references if make is pendulum else {}
    return replace(task, scores=lambda agent: scores(agent, data, o), references=references)


TASKS = {"pendulum": partial(task_of, pendulum), "pointmaze": partial(task_of, pointmaze)}


def main() -> None:
    sizes = {"updates": 10_000, "seeds": 4, "episodes": 20}
    parser = make_parser(__doc__, "policies", tasks=TASKS, **sizes)
    add = parser.add_argument
    add("--bc-weights", type=float, nargs="+", default=[0.5, 2.0], help="weights of DDPG+BC")
    add("--critics", nargs="+", choices=CRITICS, default=list(CRITICS), help="of DDPG+BC")
    add(
        "--only-flows",
        action="store_true",
        help="weighted, conditioned and best of N, with value gaps",
    )
    run(parser.parse_args(), TASKS, keys=("task", "variant", "way"))


if __name__ == "__main__":
    main()
