"""A flow with one Euler step that imitates a flow with ten: its score and the time of an action.

    python benchmarks/bench_distillation.py --compile
    python benchmarks/bench_distillation.py --tasks halfcheetah --halfcheetah FILE.npz --seeds 3

A flow that clones the log is trained as in ``bench_policies.py``, with critics of the same settings.
A second network of the same size, a flow policy with one step, is then trained to give the flow's
action from the same noise: the mean squared error over the log's observations, with new noise in
every update. Both are evaluated alone and with the best of 32 actions by the same critics. The
controls are the same flow with fewer Euler steps, which need no training. The time of an action
(batch 1 and 256) is then measured in alternating blocks. Writes benchmarks/results/NAME.json after each
task.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_learning import RESULTS, machine
from bench_policies import CANDIDATES, TASKS, returns, train
from iql_torchrl import policies
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.files import whole_file
from iql_torchrl.losses import LossCritics
from iql_torchrl.networks import join_observations

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

ONE, FLOW = "one step, distilled", "flow"
BATCH = 256  # of the distillation
FEWER = (1, 2, 5)  # Euler steps of the controls


def with_steps(flow: Any, steps: int) -> Any:
    """A copy of ``flow`` with that many Euler steps."""
    fewer = copy.deepcopy(flow)
    fewer.num_steps = steps
    return fewer


def distil(flow: Any, rows: TensorDictBase, updates: int, *, rate: float, seed: int) -> Any:
    """A flow policy with one step, trained to give the actions of ``flow`` from the same noise.

    It starts from the weights of ``flow``. The error is ``|z + v(s, z, 0) - a|**2`` with a the
    action of ``flow`` from noise z, in units in which the action's bounds are -1 and 1. The one step
    is not clamped in training, so that its gradient does not vanish beyond the bounds.
    """
    one = with_steps(flow, 1).train()
    optimizer = torch.optim.Adam(one.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, updates))
    generator = torch.Generator().manual_seed(seed)
    start = torch.zeros(BATCH)
    for _ in range(updates):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        noise = torch.randn(BATCH, flow.action_features, generator=generator)
        with torch.no_grad():
            action = flow.normalise(flow.from_noise(batch, noise))
        observation = join_observations([batch.get(key) for key in one.in_keys])
        predicted = noise + one.velocity(observation, noise, start)
        optimizer.zero_grad()
        (predicted - action).square().sum(-1).mean().backward()
        optimizer.step()
        schedule.step()
    return one.eval()


def unexplained(one: Any, flow: Any, rows: TensorDictBase, *, seed: int = 1) -> float:
    """Squared error of ``one`` as a share of the flow's variance over the noise, over 4,096 rows."""
    generator = torch.Generator().manual_seed(seed)
    batch = rows[torch.randint(len(rows), (4096,), generator=generator)]
    noise = torch.randn(16, 4096, flow.action_features, generator=generator)
    with torch.no_grad():
        exact, near = (p.normalise(p.from_noise(batch, noise)) for p in (flow, one))
    return float((near - exact).square().mean() / exact.var(0).mean())


def ways(agent: Any, one: Any) -> dict[str, tuple[Any, bool]]:
    """The compared policies, and whether each is evaluated without random numbers."""
    critics = LossCritics(agent.loss)
    actors = {FLOW: agent.actor, ONE: one}
    actors |= {f"flow with {n} steps": with_steps(agent.actor, n) for n in FEWER}
    best = {
        f"{name}, best of {CANDIDATES}": (policies.best_of(actor, critics, CANDIDATES), True)
        for name, actor in actors.items()
    }
    return {name: (actor, False) for name, actor in actors.items()} | best


def times(
    compared: Mapping[str, tuple[Any, bool]], rows: TensorDictBase, size: int, o: argparse.Namespace
) -> dict[str, list[float]]:
    """Milliseconds of a call on ``size`` observations: one number a round, blocks in turn."""
    keys = next(iter(compared.values()))[0].in_keys
    observed = rows.select(*keys)[:size]

    def block(policy: Any, calls: int) -> float:
        began = time.perf_counter()
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            for _ in range(calls):
                policy(TensorDict(dict(observed.items()), [size]))
        return (time.perf_counter() - began) / calls

    calls = {n: max(1, round(o.block / block(p, 3))) for n, (p, _) in compared.items()}
    taken: dict[str, list[float]] = {name: [] for name in compared}
    for number in range(o.rounds):
        names = list(compared)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(1e3 * block(compared[name][0], calls[name]))
    return taken


def run(o: argparse.Namespace, name: str) -> dict[str, Any]:
    data, config = TASKS[name](o)
    config = replace(config, updates=o.updates, compile=o.compile, policy="flow", temperature=0.0)
    scores: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    compared: dict[str, tuple[Any, bool]] = {}
    for seed, agent in enumerate(train(o, data, [config])):
        agent.actor.eval()
        rows = data.transitions
        one = distil(agent.actor, rows, o.distil_updates, rate=o.rate, seed=seed)
        compared = ways(agent, one)
        for way, (policy, deterministic) in compared.items():
            scores.setdefault(way, []).append(returns(o, data, policy, deterministic))
            if not deterministic:
                errors.setdefault(way, []).append(unexplained(policy, agent.actor, rows))
        shown = ", ".join(f"{way}: {values[-1]:.1f}" for way, values in scores.items())
        print(f"{name}, seed {seed}: {shown}", flush=True)
    acting = {str(size): times(compared, data.transitions, size, o) for size in o.batches}
    return {"task": name, "rows": len(data), "config": config.to_dict(),
            "unexplained": errors, "scores": scores, "acting_ms": acting}  # fmt: skip


def table(task: Mapping[str, Any]) -> str:
    """Mean return with Student's 95 % interval; times of an action, also as shares of the flow's."""
    batches = "".join(f"{f'batch {size}, ms':>18}" for size in task["acting_ms"])
    lines = [f"{task['task']:34}{'return':>28}{batches}"]
    for way, values in task["scores"].items():
        mean, low, high = mean_interval(np.array(values))
        text = f"{way:34}{f'{mean:.1f} ({low:.1f} to {high:.1f})':>28}"
        reference = f"{FLOW}, best of {CANDIDATES}" if "best" in way else FLOW
        for taken in task["acting_ms"].values():
            ratios = [a / b for a, b in zip(taken[way], taken[reference], strict=True)]
            cell = f"{statistics.median(taken[way]):.3f} ({statistics.median(ratios):.2f})"
            text += f"{cell:>18}"
        lines.append(text)
    lines.append("squared error against the flow, as a share of its variance over the noise:")
    lines += [f"{way:34}{np.mean(share):28.3f}" for way, share in task["unexplained"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=["pendulum"])
    add("--halfcheetah", type=Path, help="file of HalfCheetah's log")
    add("--updates", type=int, default=10_000, help="of the flow and the critics")
    add("--distil-updates", type=int, default=10_000)
    add("--rate", type=float, default=1e-3, help="of the distillation; falls to 0 by a cosine")
    add("--seeds", type=int, default=4)
    add("--episodes", type=int, default=20)
    add("--batches", type=int, nargs="+", default=[1, 256], help="observations of an action")
    add("--rounds", type=int, default=15, help="of the times of an action")
    add("--block", type=float, default=0.3, help="seconds")
    add("--compile", action="store_true")
    add("--result", default="distillation")
    o = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tasks: list[dict[str, Any]] = []
    for name in o.tasks:
        tasks.append(run(o, name))
        record = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "options": vars(o),
            "tasks": tasks,
        }
        RESULTS.mkdir(exist_ok=True)
        with whole_file(RESULTS / f"{o.result}.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1, default=str) + "\n")
        print(f"\n{table(tasks[-1])}\n", flush=True)


if __name__ == "__main__":
    main()
