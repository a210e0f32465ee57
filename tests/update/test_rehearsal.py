"""Updates on ``meta`` in place of a GPU: nothing is on the CPU, is copied or waits for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from one_device import OneDevice, meta, values_are_assumed
from small_agents import config, small_columns
from torch import optim
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from iql_torchrl import PRESETS, IQLConfig, compiled, load_dataset, make_agent
from iql_torchrl.data import DeviceSampler
from iql_torchrl.population import IQLPopulation
from iql_torchrl.update.captured import upcoming_lrs
from iql_torchrl.update.compiled import GraphUpdate, learning_rates

__all__ = ["meta"]
pytestmark = [
    pytest.mark.usefixtures("meta"),
    # Dynamo's fake tensors on meta alone: real devices have this kernel
    pytest.mark.filterwarnings("ignore:aten..broadcast_tensors. an autograd kernel:UserWarning"),
]


def continuous():
    return load_dataset(small_columns())


def discrete(masked: bool = False):
    masks = {f"{when}action_mask": np.ones((40, 4), bool) for when in ("", "next_")}
    data = load_dataset(small_columns(action=np.arange(40) % 4, **(masks if masked else {})))
    return replace(data, action_space=spaces.Discrete(4))


def categories():
    data = load_dataset(small_columns(observation=np.arange(40) % 6, action=np.arange(40) % 4))
    return replace(data, observation_space=spaces.Discrete(6), action_space=spaces.Discrete(4))


def on_meta(settings: IQLConfig, data: Any) -> Any:
    with values_are_assumed():
        return make_agent(replace(settings, device="meta"), data)


def batch_of(data: Any, *shape: int) -> Any:
    rows = data.transitions[: int(np.prod(shape or (16,)))].exclude(("collector", "traj_ids"))
    rows = rows.clone() if not shape else rows.reshape(*shape).clone()
    rows["next", "truncated"] = torch.zeros_like(rows["next", "terminated"])
    return rows.to("meta")


def check_eager(step: Any, batch: Any) -> None:
    with OneDevice("meta") as mode:
        for _ in range(2):
            metrics = step(batch.copy())
    assert {value.device.type for value in metrics.values()} == {"meta"}
    assert mode.operations > 100


def check_traced(step: Any, batch: Any) -> None:
    """The update as Dynamo traced it: the program's own operations are checked."""
    torch._dynamo.reset()
    seen = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*arguments: Any) -> Any:
            with OneDevice("meta") as mode:
                result = graph(*arguments)
            seen.append(mode.operations)
            return result

        return run

    fast = compiled(step, backend=backend)
    for _ in range(2):
        metrics = fast(batch.copy())
    assert {value.device.type for value in metrics.values()} == {"meta"}
    assert len(seen) == 2
    assert min(seen) > 100


SETTINGS = {
    "gaussian": (continuous, {"policy": "gaussian", "diagnostics": True}),
    "tanh_normal": (continuous, {"policy": "tanh_normal"}),
    "deterministic": (continuous, {"policy": "deterministic"}),
    "mixture": (continuous, {"policy": "mixture"}),
    "discrete": (discrete, {}),
    "masked": (lambda: discrete(masked=True), {}),
    "categories": (categories, {}),
    "simultaneous": (
        continuous,
        {"order": "simultaneous", "max_grad_norm": 0.5, "optimizer": "adamw", "schedule": "cosine"},
    ),
    "dropout and norms": (continuous, {"dropout": 0.1, "layer_norm": True, "max_grad_norm": 1.0}),
    "sarsa": (continuous, {"value_objective": "sarsa_expectile", "num_critics": 1}),
    **{name: (continuous, preset) for name, preset in PRESETS.items()},
}


def settings_of(given: Any) -> IQLConfig:
    if isinstance(given, IQLConfig):
        return replace(given, hidden=(8,), batch_size=16, updates=10)
    return config(**{name: value for name, value in given.items() if name != "diagnostics"})


@pytest.mark.parametrize("name", SETTINGS)
def test_an_eager_update(name):
    make, given = SETTINGS[name]
    data = make()
    check_eager(on_meta(settings_of(given), data).step, batch_of(data))


TRACED = ("gaussian",)


@pytest.mark.parametrize(
    "name", [n if n in TRACED else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS]
)
def test_a_traced_update(name):
    make, given = SETTINGS[name]
    data = make()
    check_traced(on_meta(settings_of(given), data).step, batch_of(data))


@pytest.mark.parametrize("kind", ["mask", "weights", "steps"])
def test_batches_with_a_mask_with_weights_and_of_several_steps(kind):
    data = continuous()
    batch = batch_of(data, 4, 5) if kind == "mask" else batch_of(data)
    if kind == "mask":
        batch["collector", "mask"] = torch.ones(4, 5, dtype=torch.bool, device="meta")
    elif kind == "weights":
        batch["priority_weight"] = torch.ones(16, device="meta")
    else:
        batch["steps_to_next_obs"] = torch.ones(16, 1, dtype=torch.int64, device="meta")
    check_eager(on_meta(config(), data).step, batch)


@pytest.mark.parametrize("batches", ["shared", "own"])
@pytest.mark.parametrize("policy", ["gaussian", "tanh_normal", "deterministic"])
def test_a_population(batches, policy):
    data = continuous()
    settings = config(device="meta", policy=policy, compile=False, max_grad_norm=1.0)
    with values_are_assumed():
        population = IQLPopulation(
            [replace(settings, seed=seed) for seed in range(3)], data, batches=batches
        )
        with population.step.modes():
            pass
    population.sampler.generator = None
    with OneDevice("meta"):
        batch = population.sampler.sample()
    check_eager(population.step, batch)


def test_a_sampler_draws_on_its_device():
    sampler = DeviceSampler(continuous().transitions, 8, device="meta", seed=0)
    assert sampler.generator.device == torch.device("meta")
    sampler.generator = None  # torch has no generator for meta
    with OneDevice("meta"):
        batch = sampler.sample()
    assert batch["observation"].shape == (8, 3)


# -- learning rates, and where the optimizer counts --------------------------------------------------


def with_adam(rate: Any, schedule: Any = None) -> Any:
    """The agent's step with Adam of another learning rate."""
    step = on_meta(config(), continuous()).step
    groups = [{"params": g["params"]} for g in step.optimizer.param_groups]
    step.optimizer = optim.Adam(groups, lr=0.25, capturable=True)
    for group in step.optimizer.param_groups:  # Adam itself compares a given rate with 0
        group["lr"] = rate
    step.lr_schedulers = () if schedule is None else (schedule(step.optimizer),)
    return step


def test_a_rate_on_the_cpu_becomes_one_on_the_device():
    rate = torch.tensor(0.25)
    update = GraphUpdate(with_adam(rate))
    before = update.moments().rates
    assert {each.device.type for each in before} == {"meta"}
    rate.fill_(0.5)
    after = update.moments().rates  # the same tensors, for the same program
    assert all(a is b for a, b in zip(before, after, strict=True))
    groups = update.step.optimizer.param_groups
    assert learning_rates(groups, update.step.device).tolist() == [0.5] * 3


def test_a_number_in_place_of_a_tensor_that_was_changed_is_written():
    """As a saved number replaces the tensor, which a schedule has changed after the last update."""
    step = make_agent(config(), continuous()).step.plain
    rate = torch.tensor(0.25)
    for group in step.optimizer.param_groups:
        group["lr"] = rate
    update = GraphUpdate(step)
    update.moments()
    rate.fill_(0.5)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.5
    assert [each.item() for each in update.moments().rates] == [0.5] * 3


@pytest.mark.parametrize("rate", [0.25, "tensor on the device"])
def test_rates_are_copied_to_the_device_and_not_read_from_it(rate):
    rate = torch.tensor(0.25, device="meta") if isinstance(rate, str) else rate
    update = GraphUpdate(with_adam(rate))
    update.moments()
    with OneDevice("meta"):
        moments = update.moments()
    assert {each.device.type for each in moments.rates} == {"meta"}
    assert all(a is b for a, b in zip(moments.rates, update.moments().rates, strict=True))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 10),
        lambda optimizer: LambdaLR(optimizer, lambda update: 0.9**update),
    ],
)
def test_upcoming_lrs_are_not_read_from_the_device(schedule):
    rate = torch.tensor(0.25, device="meta")
    step = with_adam(rate, schedule)
    step.optimizer.param_groups[2]["lr"] = 0.125  # one group with a number
    with OneDevice("meta"):
        table = upcoming_lrs(step, 1)
    assert (table.shape, table.device.type, table.dtype) == ((2, 3), "meta", torch.float64)


@pytest.mark.parametrize("capturable", [True, False])
def test_updates_are_counted_on_the_device_only_where_a_group_says_so(capturable):
    step = with_adam(0.25)
    for group in step.optimizer.param_groups[: 2 if capturable else 3]:
        group["capturable"] = False
    counts = GraphUpdate(step).moments().steps
    assert counts.device.type == ("meta" if capturable else "cpu")
    assert len(counts) == len(list(step.loss.parameters()))
