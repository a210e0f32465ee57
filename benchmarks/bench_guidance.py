"""How near a trained conditioned flow is to the dataset (w = 0) and to its positive part (w = 1).

    python benchmarks/bench_guidance.py
    python benchmarks/bench_guidance.py --only baseline all --seeds 5 --result guidance_seeds

A bandit with three arms, each a Gaussian around its action; the upper two have a positive advantage. So
both distributions of actions are known. Each line changes one setting of the baseline, the settings of
``bench_policies.py`` on Pendulum with 4,000 updates; "all" changes those that help. Each flow acts with
10 and with 50 Euler steps. Over training seeds: how often the two-sample test of Kolmogorov and Smirnov
at 1 % accepts 400 drawn actions as equal to 400 of the known distribution (100 seeds of draws), and the
distance of 20,000 drawn actions from its distribution function. The first line compares two samples of
the known distribution. Writes benchmarks/results/guidance.json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from typing import Any

from iql_torchrl import PRESETS, IQLConfig, IQLPopulation, OfflineDataset, load_dataset, policies
from iql_torchrl.report import text_table
from record import place, save

import numpy as np
import torch
from gymnasium.spaces import Box
from scipy import stats

SHARE = np.array([0.5, 0.3, 0.2])  # how often the dataset takes an arm
ACTION, WIDTH = np.array([-0.55, 0.0, 0.55]), 0.12
REWARD = np.array([-1.0, 0.4, 0.6])  # V is their mean, -0.26
POSITIVE = np.where(REWARD > 0, SHARE, 0) / SHARE[REWARD > 0].sum()
KNOWN = {0.0: SHARE, 1.0: POSITIVE}
DRAWS, TESTS, MANY = 400, 100, 20_000
BASELINE = replace(
    PRESETS["quick"],
    policy="flow",
    actor_objective="conditioned_flow",
    expectile=0.5,
    hidden=(64, 64),
    reward="raw",
    standardise=False,  # the observation is constant
    updates=4_000,
)
HELPFUL = {"hidden": (64, 64, 64), "updates": 16_000}
STEPS = (10, 50)  # Euler steps of an action: of the same trained flow
CASES = {f"{w:g}, {steps}": (w, steps) for w in KNOWN for steps in STEPS}
#: name -> settings that differ from the baseline, and the dataset's rows
LINES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "schedule constant": {"schedule": "constant"},
    "constant, actor_ema 0.999": {"schedule": "constant", "actor_ema": 0.999},
    "actor_ema 0.999": {"actor_ema": 0.999},
    "hidden 256, 256": {"hidden": (256, 256)},
    "hidden 64, 64, 64": {"hidden": (64, 64, 64)},
    "tanh": {"activation": "tanh"},
    "gelu": {"activation": "gelu"},
    "layer_norm": {"layer_norm": True},
    "condition_dropout 0.4": {"condition_dropout": 0.4},
    "actor_lr 3e-3": {"actor_lr": 3e-3},
    "batch_size 1024": {"batch_size": 1024},
    "updates 16000": {"updates": 16_000},
    "log of 2,000 rows": {"rows": 2_000},
    "all": HELPFUL,
}


def drawn(share: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions of arms taken with probabilities ``share``, clipped as the policy's; and the arms."""
    draw = np.random.default_rng(seed)
    arm = draw.choice(len(share), count, p=share)
    return (ACTION[arm] + WIDTH * draw.normal(size=count)).clip(-1, 1), arm


def make_log(rows: int) -> OfflineDataset:
    action, arm = drawn(SHARE, rows, seed=1)
    columns = {
        "observation": np.zeros((rows, 1), np.float32),
        "action": action[:, None].astype(np.float32),
        "reward": REWARD[arm].astype(np.float32),
        "terminated": np.ones(rows, bool),
        "truncated": np.zeros(rows, bool),
    }
    return load_dataset(columns, action_space=Box(-1.0, 1.0, (1,), np.float32))


def other_samples(share: np.ndarray, count: int, seed: int) -> np.ndarray:
    return drawn(share, count, 5_000 + seed)[0]


def distribution_function(share: np.ndarray) -> Any:
    return lambda x: (share * stats.norm.cdf((x[:, None] - ACTION) / WIDTH)).sum(1)


def compared(act: Any, share: np.ndarray) -> dict[str, float]:
    """``act(count, seed)`` against the known distribution: acceptance, and distance."""
    accepted = [
        stats.ks_2samp(act(DRAWS, seed), drawn(share, DRAWS, 1_000 + seed)[0]).pvalue > 0.01
        for seed in range(TESTS)
    ]
    distance = stats.kstest(act(MANY, 0), distribution_function(share)).statistic
    return {"accepted": float(np.mean(accepted)), "distance": float(distance)}


def run(seeds: int, rows: int = 20_000, **settings: Any) -> tuple[list[dict[str, Any]], float]:
    """For each training seed case -> the comparison; and the seconds of training of one run."""
    config: IQLConfig = replace(BASELINE, **settings)
    torch.manual_seed(0)
    population = IQLPopulation([replace(config, seed=s) for s in range(seeds)], make_log(rows))
    start = time.perf_counter()
    for _ in population.train(config.updates, every=config.updates):
        pass
    seconds = (time.perf_counter() - start) / seeds
    return [of_flow(population.member(number)) for number in range(seeds)], seconds


def of_flow(agent: Any) -> dict[str, Any]:
    """(w, Euler steps) -> the comparison of one trained agent."""

    def act(count: int, seed: int) -> np.ndarray:
        states = np.zeros((count, 1), np.float32)
        actions: np.ndarray = agent.act(states, deterministic=False, seed=seed)
        return actions[:, 0]

    comparisons = {}
    flow = next(m for m in agent.policy.modules() if isinstance(m, policies.FlowPolicy))
    for case, (w, steps) in CASES.items():
        flow.guidance, flow.num_steps = w, steps
        comparisons[case] = compared(act, KNOWN[w])
    return comparisons


def table(lines: dict[str, Any]) -> str:
    """Acceptance, mean and least over training seeds; distance, mean and greatest."""
    rows = [["w, Euler steps", *CASES, "s a run"]]
    for name, line in lines.items():
        cells = []
        for case in CASES:
            accepted, distance = (
                np.array([of_seed[case][key] for of_seed in line["seeds"]])
                for key in ("accepted", "distance")
            )
            share = f"{accepted.mean():.0%} ({accepted.min():.0%})"
            cells.append(f"{share}, {distance.mean():.3f} ({distance.max():.3f})")
        rows.append([name, *cells, f"{line['seconds']:.0f}"])
    return text_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--result", default="guidance")
    o = parser.parse_args()
    torch.set_num_threads(1)
    of_share = {w: compared(partial(other_samples, share), share) for w, share in KNOWN.items()}
    exact = {case: of_share[w] for case, (w, _) in CASES.items()}
    lines: dict[str, Any] = {"the distribution itself": {"seeds": [exact], "seconds": 0}}
    for name in o.only:
        of_seeds, seconds = run(o.seeds, **LINES[name])
        lines[name] = {"settings": LINES[name], "seeds": of_seeds, "seconds": seconds}
        print(f"{name}: {of_seeds}", flush=True)
        save(place(o.result), {"baseline": BASELINE.to_dict(), "lines": lines})
    print(f"\n{table(lines)}")


if __name__ == "__main__":
    main()
