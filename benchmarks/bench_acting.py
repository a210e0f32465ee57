"""Time of an action and of an update of each kind of policy, next to the Gaussian's.

    python benchmarks/bench_acting.py
    python benchmarks/bench_acting.py --batches 1 256 --samples 1 8 32 --forms eager captured

Policies: Gaussian; the deterministic one of DDPG+BC; a flow (10 Euler steps); the best of N actions of
that flow by two critics. An action is a call of the policy on a batch of observations, in evaluation
mode, without random numbers for the Gaussian and with drawn noise for the flow. An update includes
sampling; it does not depend on N, which only acting reads. Sizes are HalfCheetah's (observation 17,
action 6) on random transitions. Blocks of all policies alternate, and ratios are medians of the
ratios of neighbouring blocks. Writes benchmarks/results/NAME_DEVICE.json.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from bench_step import machine_of, measure
from iql_torchrl import Agent, IQLConfig, load_dataset, make_agent, policies
from iql_torchrl.data import OfflineDataset
from iql_torchrl.losses import LossCritics
from record import RESULTS, save
from step_rivals import Made, Rival, Sizes, in_form

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

REFERENCE = "Gaussian"
#: Settings of ``IQLConfig``; ``bc_weight`` decides no time.
POLICIES: dict[str, dict[str, Any]] = {
    REFERENCE: {"policy": "gaussian"},
    "DDPG+BC": {"policy": "deterministic", "actor_objective": "ddpg_bc"},
    "flow": {"policy": "flow"},
}
EPISODE = 1000  # steps


def dataset(rows: TensorDict) -> OfflineDataset:
    """The random transitions as a log whose actions lie in [-1, 1]."""
    names = {"observation": "observation", "action": "action"}
    table = {name: rows[key].numpy() for name, key in names.items()}
    ends = np.arange(len(rows)) % EPISODE == EPISODE - 1
    table |= {
        "next_observation": rows["next", "observation"].numpy(),
        "reward": rows["next", "reward"].flatten().numpy(),
        "terminated": np.zeros(len(rows), bool),
        "truncated": ends,
    }
    ones = np.ones(table["action"].shape[-1], np.float32)
    with warnings.catch_warnings():  # rows do not continue one another
        warnings.simplefilter("ignore")
        return load_dataset(table, action_space=spaces.Box(-ones, ones))


def agent_of(kind: str, rows: TensorDict, sizes: Sizes, device: str) -> Agent:
    config = IQLConfig(
        **POLICIES[kind],
        hidden=(sizes.width,) * 2,
        batch_size=sizes.batch,
        num_critics=sizes.critics,
        reward="raw",
        device=device,
    )
    return make_agent(config, dataset(rows))


def acting(kind: str, samples: int | None, rows: TensorDict, sizes: Sizes, device: str) -> Made:
    """A call of the policy on ``sizes.batch`` observations; with ``samples`` the best of so many."""
    agent = agent_of(kind, rows, sizes, device)
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
    step = agent_of(kind, rows, sizes, device).step
    return in_form(step, form, dataset(rows).transitions, sizes, device)


def summarise(results: dict[str, dict[str, Any]]) -> None:
    """Medians, and of the ratios to the Gaussian's neighbouring block the median, least, greatest."""
    reference = results[REFERENCE]["ms"]
    for entry in results.values():
        if "failed" in entry:
            continue
        ratios = [a / b for a, b in zip(entry["ms"], reference, strict=True)]
        entry["median_ms"] = statistics.median(entry["ms"])
        entry["of_gaussian"] = statistics.median(ratios)
        entry["of_gaussian_range"] = [min(ratios), max(ratios)]


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n{'':24}{'ms':>10}{'of Gaussian':>13}{'in a round':>16}")
    for name, entry in results.items():
        if "failed" in entry:
            print(f"{name:24} {entry['failed']}")
            continue
        low, high = entry["of_gaussian_range"]
        print(
            f"{name:24}{entry['median_ms']:10.3f}{entry['of_gaussian']:13.2f}"
            f"{f'{low:.2f}..{high:.2f}':>16}",
            flush=True,
        )


def actors(samples: Sequence[int]) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {kind: partial(acting, kind, None) for kind in POLICIES}
    best = {f"flow, best of {n}": partial(acting, "flow", n) for n in samples}
    return rivals | best


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", default="cpu")
    add("--width", type=int, default=256)
    add("--batches", type=int, nargs="+", default=[1, 256], help="observations of an action")
    add("--samples", type=int, nargs="+", default=[1, 8, 32], help="candidates, N")
    add("--forms", nargs="*", choices=["eager", "captured"], default=["eager", "captured"])
    add("--update-batch", type=int, default=256)
    add("--rounds", type=int, default=15)
    add("--block", type=float, default=0.3, help="seconds")
    add("--rows", type=int, default=20_000)
    add("--result", default="acting", help="name of the result file")
    o = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # tensordict under torch.compile
    record: dict[str, Any] = {"machine": machine_of(o.device), "acting": {}, "updates": {}}

    def compare(part: str, key: str, title: str, rivals: dict[str, Rival], batch: int) -> None:
        sizes = Sizes(width=o.width, batch=batch, rows=o.rows)
        results, _ = measure(rivals, sizes, o.device, o.rounds, o.block, 0)
        summarise(results)
        show(title, results)
        record[part][key] = results
        save(RESULTS / f"{o.result}_{o.device.split(':')[0]}.json", record)

    for batch in o.batches:
        compare("acting", str(batch), f"an action, batch {batch}", actors(o.samples), batch)
    for form in o.forms:
        rivals: dict[str, Rival] = {kind: partial(updating, kind, form) for kind in POLICIES}
        compare(
            "updates", form, f"an update, {form}, batch {o.update_batch}", rivals, o.update_batch
        )


if __name__ == "__main__":
    main()
