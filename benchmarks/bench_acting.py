"""Time of an action and of an update of each kind of policy, next to the Gaussian's.

    python benchmarks/bench_acting.py
    python benchmarks/bench_acting.py --batches 1 256 --samples 1 8 32 --forms eager captured

Policies: Gaussian; the deterministic one of DDPG+BC; a flow (10 Euler steps); the best of N actions of
that flow by two critics. An action is a call of the policy on a batch of observations, in evaluation
mode, without random numbers for the Gaussian and with drawn noise for the flow. An update includes
sampling; it does not depend on N, which only acting reads. Sizes are HalfCheetah's (observation 17,
action 6) on random transitions. Blocks of all policies alternate, and ratios are medians of the
ratios of neighbouring blocks. Writes benchmarks/results/acting_DEVICE[_NAME].json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from iql_torchrl import Agent, make_agent, policies
from iql_torchrl.losses import LossCritics
from measuring import add_options, measure, show, summarise
from record import place, save
from step_rivals import Made, Rival, Sizes, config_of, dataset_of, in_form

import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

REFERENCE = "Gaussian"
#: Settings of ``IQLConfig``; ``bc_weight`` decides no time.
POLICIES: dict[str, dict[str, Any]] = {
    REFERENCE: {"policy": "gaussian"},
    "DDPG+BC": {"policy": "deterministic", "actor_objective": "ddpg_bc"},
    "flow": {"policy": "flow"},
}


def agent_of(kind: str, sizes: Sizes, device: str) -> Agent:
    return make_agent(config_of(sizes, device, reward="raw", **POLICIES[kind]), dataset_of(sizes))


def acting(kind: str, samples: int | None, rows: TensorDict, sizes: Sizes, device: str) -> Made:
    """A call of the policy on ``sizes.batch`` observations; with ``samples`` the best of so many."""
    agent = agent_of(kind, sizes, device)
    policy: Any = agent.actor
    if samples is not None:
        policy = policies.best_of(policy, LossCritics(agent.loss), samples)
    policy.eval()
    observations = rows["observation"][: sizes.batch].to(device)
    random = ExplorationType.RANDOM if kind == "flow" else ExplorationType.DETERMINISTIC

    def act() -> None:
        with torch.no_grad(), set_exploration_type(random):
            policy(TensorDict({"observation": observations}, [sizes.batch], device=device))

    return act, 1


def updating(kind: str, form: str, rows: TensorDict, sizes: Sizes, device: str) -> Made:
    """An update, sampling included."""
    return in_form(agent_of(kind, sizes, device).step, form, rows, sizes, device)


def actors(samples: Sequence[int]) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {kind: partial(acting, kind, None) for kind in POLICIES}
    return rivals | {f"flow, best of {n}": partial(acting, "flow", n) for n in samples}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser, rounds=15, block=0.3)
    add = parser.add_argument
    add("--width", type=int, default=256)
    add("--batches", type=int, nargs="+", default=[1, 256], help="observations of an action")
    add("--samples", type=int, nargs="+", default=[1, 8, 32], help="candidates, N")
    add("--forms", nargs="*", choices=["eager", "captured"], default=["eager", "captured"])
    add("--update-batch", type=int, default=256)
    add("--rows", type=int, default=20_000)
    o = parser.parse_args(arguments)
    record: dict[str, dict[str, Any]] = {"acting": {}, "updates": {}}

    def compare(part: str, key: str, rivals: dict[str, Rival], batch: int) -> None:
        sizes = Sizes(width=o.width, batch=batch, rows=o.rows)
        results, _ = measure(rivals, sizes, o.device, rounds=o.rounds, block=o.block)
        summarise(results, REFERENCE)
        show(f"{part}, {key}, batch {batch}", results)
        record[part][key] = results
        save(place("acting", o.device, o.result, folder=o.output), record, device=o.device)

    for batch in o.batches:
        compare("acting", str(batch), actors(o.samples), batch)
    for form in o.forms:
        rivals: dict[str, Rival] = {kind: partial(updating, kind, form) for kind in POLICIES}
        compare("updates", form, rivals, o.update_batch)


if __name__ == "__main__":
    main()
