"""Small populations and the same runs trained alone, with which population tests compare them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from small_agents import small_columns

from iql_torchrl import IQLConfig, load_dataset, make_agent
from iql_torchrl.population import IQLPopulation

ROWS = 60
BASE = IQLConfig(updates=50, hidden=(8, 8), batch_size=16, reward="raw", critic_lr=1e-3)
MEMBERS = (
    {},
    {"seed": 1, "expectile": 0.9, "temperature": 0.0, "value_lr": 1e-2},
    {"seed": 2, "temperature": 10.0, "max_weight": 2.0, "discount": 0.5},
    {"seed": 3, "actor_lr": 1e-2, "critic_lr": 3e-3, "expectile": 1.0},
)


def configs(members=MEMBERS, **common) -> list[IQLConfig]:
    return [replace(BASE, **common, **own) for own in members]


def dataset(kind: str = "continuous", dtype=torch.float64):
    """Episodes of ten steps, every other one terminal.

    ``kind``: continuous; images, small ones beside a vector; discrete, with action masks; categories,
    observed and chosen.
    """
    rows = np.arange(ROWS)
    ends = {"terminated": rows % 20 == 9, "truncated": rows % 20 == 19}
    if kind == "continuous":
        return load_dataset(small_columns(ROWS, **ends), dtype=dtype)
    generator = np.random.default_rng(1)
    if kind == "images":
        images = generator.integers(0, 256, (ROWS, 8, 9, 3)).astype(np.uint8)
        seen = {"camera": images, "speed": generator.normal(size=(ROWS, 2)).astype(np.float32)}
        return load_dataset(small_columns(ROWS, seen, **ends), dtype=dtype)
    action = generator.integers(0, 4, ROWS)
    allowed = generator.random((ROWS, 4)) < 0.6
    allowed[rows, action] = True
    masks = {"action_mask": allowed, "next_action_mask": np.roll(allowed, -1, 0)}
    observation = generator.integers(0, 5, ROWS) if kind == "categories" else None
    return load_dataset(small_columns(ROWS, observation, action, **ends, **masks), dtype=dtype)


@contextmanager
def double():
    """Categories become numbers of torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class Beside:
    """A population and its members' configs trained alone, on the same batches."""

    def __init__(self, settings, data, batches: str = "shared") -> None:
        self.population = IQLPopulation(settings, data, batches=batches)
        self.agents = [make_agent(config, data) for config in settings]

    def train(self, updates: int, change=None, step=None):
        """Metrics of each update, ``(population's, those of the runs alone)``."""
        metrics = []
        for _ in range(updates):
            batch = self.population.sampler.sample()
            batch = batch if change is None else change(batch)
            own = [batch] * len(self.agents) if batch.ndim == 1 else batch.unbind(0)
            alone = [a.step(b.clone()) for a, b in zip(self.agents, own, strict=True)]
            metrics.append(((step or self.population.step)(batch.clone()), torch.stack(alone)))
        return metrics

    def train_captured(self, call, sampler, change=None) -> None:
        """A captured call, and updates of the runs alone on rows of ``sampler`` after ``change``."""
        means, alone = call(), []
        for _ in range(call.updates):
            batch = sampler.sample()
            batch = batch if change is None else change(batch, sampler.generator)
            own = zip(self.agents, batch.unbind(0), strict=True)
            alone.append(torch.stack([agent.step(rows) for agent, rows in own]))
        expected = torch.stack(alone).mean(0).double()
        assert_close(dict(means.items()), dict(expected.items()), 1e-9)

    def assert_equal(self, metrics=(), rtol: float = 1e-10) -> None:
        """Weights, targets and metrics, relative to each tensor's largest value."""
        for number, agent in enumerate(self.agents):
            actual = self.population.member(number).loss.state_dict()
            assert_close(actual, agent.loss.state_dict(), rtol)
        for actual, reference in metrics:
            assert_close(dict(actual.items()), dict(reference.items()), 10 * rtol)


def assert_close(actual, reference, rtol: float) -> None:
    assert actual.keys() == reference.keys()
    for name, expected in reference.items():
        if isinstance(expected, torch.Tensor):
            assert actual[name].shape == expected.shape, name
            scale = expected.abs().max().clamp(min=1e-3)
            assert (actual[name] - expected).abs().max() <= rtol * scale, name


def of_members(lift, name: str, batch):
    """``actor_loss``, ``value_loss`` or ``qvalue_loss`` of every member of a ``Lift``, ``(P,)``."""
    loss = lift.loss
    terms = {
        "actor_loss": lambda batch: loss.actor_term(batch, loss.advantage(batch))[0],
        "value_loss": lambda batch: loss.value_term(batch, loss.target_qvalue(batch))[0],
        "qvalue_loss": lambda batch: loss.qvalue_term(batch, loss.td_target(batch))[0],
    }
    return lift.evaluate(terms[name], lift.prepare_batch(batch))


def extras(batch):
    """n-step rewards, priorities, and padding that holds nan."""
    batch = batch.clone()
    generator = torch.Generator().manual_seed(int(batch["next", "reward"].abs().sum() * 1e6))
    shape = (*batch.batch_size, 1)
    keep = torch.rand(shape, generator=generator) < 0.7
    keep |= ~keep.any(-2, keepdim=True)  # a loss refuses a batch that is all padding
    batch["steps_to_next_obs"] = torch.randint(1, 5, shape, generator=generator)
    batch["priority_weight"] = torch.rand(shape, generator=generator).to(batch["next", "reward"])
    batch["collector", "mask"] = keep.squeeze(-1)
    batch["next", "reward"] = batch["next", "reward"].masked_fill(~keep, torch.nan)
    return batch


def noise(batch):
    """Random numbers of flow policies, the same for a run alone and in the population."""
    batch, shape = batch.clone(), tuple(batch.batch_size)
    generator = torch.Generator().manual_seed(int(batch["next", "reward"].abs().sum() * 1e6))
    options = {"generator": generator, "dtype": torch.float64}
    batch["flow_noise"] = torch.randn(*shape, 2, **options)
    for name in ("flow_time", "flow_drop"):
        batch[name] = torch.rand(shape, **options)
    return batch


def noise_and_extras(batch):
    return extras(noise(batch))


def shifts(batch):
    """By what images are moved: in place of random numbers, which differ between members."""
    batch = batch.clone()
    for key in ("image_shift", "next_image_shift"):
        batch[key] = torch.rand(*batch.batch_size, 2, dtype=torch.float64)
    return batch


# name: (dataset, options of all configs, batches, what is done to a batch)
ADAMW = {"optimizer": "adamw", "weight_decay": 0.1}
GUMBEL = {"value_objective": "gumbel", "num_critics": 3, "pessimism": 0.5}
IMAGES = {"image_features": 4, "random_shift": 2, "num_critics": 1}
SARSA = {"value_objective": "sarsa_expectile", "loss_function": "smooth_l1"}
CASES = {
    "gaussian": ("continuous", {}, "shared", None),
    "own batches": ("continuous", {"num_critics": 5, **ADAMW}, "own", None),
    "cosine": ("continuous", {"schedule": "cosine", "order": "simultaneous"}, "shared", None),
    "layer norm": ("continuous", {"layer_norm": True, "num_critics": 1}, "own", None),
    "tanh normal": ("continuous", {"policy": "tanh_normal", "schedule_steps": 3}, "shared", None),
    "mixture": ("continuous", {"policy": "mixture", "standardise": False}, "own", None),
    "deterministic": ("continuous", {"policy": "deterministic"}, "shared", None),
    "quantile": ("continuous", {"value_objective": "quantile", "loss_function": "l1"}, "own", None),
    "sarsa": ("continuous", SARSA, "shared", None),
    "gumbel": ("continuous", GUMBEL, "shared", None),
    "extras": ("continuous", {}, "shared", extras),
    "extras, own": ("continuous", {"order": "simultaneous"}, "own", extras),
    "chunks": ("continuous", {"action_chunk": 3, "policy": "mixture"}, "shared", None),
    "images": ("images", IMAGES, "shared", shifts),
    "images, all": ("images", {**IMAGES, "encoder_gradient": "all"}, "own", shifts),
    "discrete": ("discrete", {"layer_norm": True, **ADAMW}, "shared", None),
    "categories": ("categories", {"num_critics": 1, "schedule": "constant"}, "own", extras),
}


# Objectives, and members that differ in their hyperparameters
CONDITIONED = {"policy": "flow", "actor_objective": "conditioned_flow", "flow_steps": 3}
FLOWS = ({}, {"seed": 1, "temperature": 0.0}, {"seed": 2, "temperature": 10.0, "actor_lr": 1e-2})
DROPS = ({}, {"seed": 1, "condition_dropout": 0.6}, {"seed": 2, "actor_lr": 1e-2})
BC = ({"bc_weight": 0.1}, {"seed": 1, "bc_weight": 2.0}, {"seed": 2, "expectile": 0.9})
ALPHAS = tuple({"seed": seed, "alpha": alpha} for seed, alpha in enumerate((0.05, 0.4, 5.0)))
OF_FLOW = {"members": FLOWS, "policy": "flow"}
OF_CONDITION = {"members": DROPS, "guidance": 2.0, **CONDITIONED}
OF_DDPG = {"members": BC, "actor_objective": "ddpg_bc"}
OF_ALPHA = {"members": ALPHAS, "num_critics": 3, "pessimism": 0.5}
EXACT = {"policy": "deterministic"}
OBJECTIVES = {
    "average": ("continuous", {"members": DROPS[::2], "actor_ema": 0.75}, "shared", None),
    "flow": ("continuous", OF_FLOW, "shared", noise),
    "flow, extras": ("continuous", OF_FLOW, "shared", noise_and_extras),
    "flow, own": ("continuous", OF_FLOW, "own", noise_and_extras),
    "conditioned flow": ("continuous", OF_CONDITION, "shared", noise_and_extras),
    "conditioned flow, own": ("continuous", OF_CONDITION, "own", noise_and_extras),
    "ddpg_bc": ("continuous", OF_DDPG, "shared", None),
    "ddpg_bc, extras": ("continuous", OF_DDPG, "own", extras),
    "ddpg_bc, deterministic": ("continuous", OF_DDPG | EXACT, "own", None),
    "ddpg_bc, deterministic, extras": ("continuous", OF_DDPG | EXACT, "shared", extras),
    "sparse": ("continuous", {"value_objective": "sparse", **OF_ALPHA}, "own", extras),
    "exponential": ("continuous", {"value_objective": "exponential", **OF_ALPHA}, "own", extras),
}
