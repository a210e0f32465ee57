"""The competitors of bench_population.py: single runs, populations, bare matrix products."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from iql_torchrl import (
    IQLConfig,
    IQLPopulation,
    OfflineDataset,
    captured,
    load_dataset,
    make_agent,
)
from step_floors import products, replayed
from step_rivals import Made, Rival, Sizes, in_form

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict

SINGLES = ("single captured", "single compiled")
FLOORS = ("floor batched", "floor one by one")


def dataset_of(sizes: Sizes) -> OfflineDataset:
    """Random steps; every episode is cut off after 1000."""
    draw, last = np.random.default_rng(0), np.arange(1, sizes.rows + 1) % 1000 == 0
    here = np.arange(sizes.rows) + np.arange(sizes.rows) // 1000  # one more state per episode
    state = draw.normal(size=(here[-1] + 2, sizes.observation)).astype(np.float32)
    arrays = {
        "observations": state[here],
        "next_observations": state[here + 1],
        "actions": draw.uniform(-1, 1, (sizes.rows, sizes.action)).astype(np.float32),
        "rewards": draw.normal(size=sizes.rows).astype(np.float32),
        "terminals": np.zeros(sizes.rows, np.bool_),
        "timeouts": last,
    }
    box = partial(spaces.Box, dtype=np.float32)
    return load_dataset(
        arrays,
        observation_space=box(-np.inf, np.inf, (sizes.observation,)),
        action_space=box(-1, 1, (sizes.action,)),
        progress=False,
    )


def config_of(sizes: Sizes, device: str, **more: Any) -> IQLConfig:
    hidden = (sizes.width, sizes.width)
    return IQLConfig(
        hidden=hidden, batch_size=sizes.batch, num_critics=sizes.critics, device=device, **more
    )


def single(
    form: str, log: OfflineDataset, updates: int, _: TensorDict, sizes: Sizes, device: str
) -> Made:
    step = make_agent(config_of(sizes, device), log).step
    return in_form(step, form, log.transitions, sizes, device, updates)


def population(
    batches: str,
    form: str,
    log: OfflineDataset,
    updates: int,
    count: int,
    _: TensorDict,
    sizes: Sizes,
    device: str,
) -> Made:
    # knobs differ between members, so that none is a constant of the program
    configs = [
        config_of(sizes, device, seed=number, temperature=float(number % 4), expectile=expectile)
        for number, expectile in zip(range(count), np.linspace(0.5, 0.9, count), strict=True)
    ]
    runs = IQLPopulation(configs, log, batches=batches)
    if form == "captured":
        return captured(runs.step, runs.sampler, updates=updates), updates
    return (lambda: runs.step(runs.sampler.sample())), 1


def floor(count: int, batched: bool, _: TensorDict, sizes: Sizes, device: str) -> Made:
    """Operands of one shape share their memory, so that it stays in the cache where it fits."""
    operand = lru_cache(None)(lambda *shape: torch.randn(shape, device=device))
    result = lru_cache(None)(lambda *shape: torch.empty(shape, device=device))
    work = [
        (operand(count, *a), operand(count, *b), result(count, a[0], b[1]))
        for a, b in products(sizes)
    ]
    multiply = torch.bmm if batched else torch.mm
    if not batched:
        work = [piece for triple in work for piece in zip(*triple, strict=True)]

    def update() -> object:
        return [multiply(a, b, out=out) for a, b, out in work][-1]

    return (replayed(update, work) if device.startswith("cuda") else update), 1


def competitors(log: OfflineDataset, updates: int, count: int) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {
        name: partial(single, name.split()[1], log, updates) for name in SINGLES
    }
    for batches in ("shared", "own"):
        for form in ("captured", "eager"):
            rivals[f"{batches} {form}"] = partial(population, batches, form, log, updates, count)
    return rivals | {
        name: partial(floor, count, batched)
        for name, batched in zip(FLOORS, (True, False), strict=True)
    }
