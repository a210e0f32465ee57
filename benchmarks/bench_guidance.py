"""How near a trained conditioned flow is to the dataset (w = 0) and to its positive part (w = 1).

    python benchmarks/bench_guidance.py
    python benchmarks/bench_guidance.py --only baseline all --seeds 5 --result guidance_seeds

A bandit with three arms, each a Gaussian around its action; the upper two have a positive advantage. So
both distributions of actions are known. Each variant changes one setting of the baseline, the settings
of ``bench_policies.py`` on Pendulum with 4,000 updates; "all" changes those that help. Each flow acts
with 10 and with 50 Euler steps. Scores: how often the two-sample test of Kolmogorov and Smirnov at 1 %
accepts 400 drawn actions as equal to 400 of the known distribution (100 seeds of draws), and the
distance of 20,000 drawn actions from its distribution function. The first line compares two samples of
the known distribution.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from iql_torchrl import PRESETS, Agent, OfflineDataset, load_dataset, policies
from study import Row, Settings, Task, make_parser, run

import numpy as np
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
STEPS = (10, 50)  # Euler steps of an action: of the same trained flow
VARIANTS: Mapping[str, Settings] = {
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
    "all": {"hidden": (64, 64, 64), "updates": 16_000},
}


def drawn(share: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions of arms taken with probabilities ``share``, clipped as the policy's; and the arms."""
    draw = np.random.default_rng(seed)
    arm = draw.choice(len(share), count, p=share)
    return (ACTION[arm] + WIDTH * draw.normal(size=count)).clip(-1, 1), arm


def dataset(rows: int) -> OfflineDataset:
    action, arm = drawn(SHARE, rows, seed=1)
    columns = {
        "observation": np.zeros((rows, 1), np.float32),
        "action": action[:, None].astype(np.float32),
        "reward": REWARD[arm].astype(np.float32),
        "terminated": np.ones(rows, bool),
        "truncated": np.zeros(rows, bool),
    }
    return load_dataset(columns, action_space=Box(-1.0, 1.0, (1,), np.float32))


def compared(act: Any, w: float) -> Row:
    """``act(count, seed)`` against the known distribution: acceptance, and distance."""
    share = KNOWN[w]
    accepted = [
        stats.ks_2samp(act(DRAWS, seed), drawn(share, DRAWS, 1_000 + seed)[0]).pvalue > 0.01
        for seed in range(TESTS)
    ]
    distance = stats.kstest(
        act(MANY, 0), lambda x: (share * stats.norm.cdf((x[:, None] - ACTION) / WIDTH)).sum(1)
    ).statistic
    return {"w": w, "accepted": float(np.mean(accepted)), "distance": float(distance)}


def scores(agent: Agent) -> Iterator[Row]:
    """For each w and number of Euler steps."""

    def act(count: int, seed: int) -> np.ndarray:
        states = np.zeros((count, 1), np.float32)
        actions: np.ndarray = agent.act(states, deterministic=False, seed=seed)
        return actions[:, 0]

    flow = next(m for m in agent.policy.modules() if isinstance(m, policies.FlowPolicy))
    for w in KNOWN:
        for steps in STEPS:
            flow.guidance, flow.num_steps = w, steps
            yield {"steps": steps, **compared(act, w)}


def task_of(rows: int, variants: Mapping[str, Settings], o: argparse.Namespace) -> Task:
    return Task(data=dataset(rows), config=BASELINE, variants=variants, scores=scores)


TASKS = {
    "20,000 rows": partial(task_of, 20_000, VARIANTS),
    "2,000 rows": partial(task_of, 2_000, {"baseline": {}}),
}


def main() -> None:
    o = make_parser(__doc__, "guidance", tasks=TASKS, seeds=3, updates=None).parse_args()
    exact = [
        compared(lambda count, seed, w=w: drawn(KNOWN[w], count, 5_000 + seed)[0], w) for w in KNOWN
    ]
    run(o, TASKS, keys=("task", "variant", "w", "steps"), exact=exact)
    print(f"The distribution itself: {exact}")


if __name__ == "__main__":
    main()
