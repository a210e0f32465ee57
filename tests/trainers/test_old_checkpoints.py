"""Checkpoints that an earlier version wrote load, and training continues from them.

The files in ``old_checkpoints/`` are states halfway and what training ended with (``expected.json``),
written with the package of commit 8952c53 by a script that is in the history of this file. They stay as
they are: a change of the package that cannot read them must keep a reader for them.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_agents import by_hand

from iql_torchrl import Agent, IQLConfig, IQLPopulation, OfflineTrainer, load_dataset, make_agent

FOLDER = Path(__file__).with_name("old_checkpoints")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
CONFIG = {"hidden": (8,), "batch_size": 8, "reward": "raw", "compile": False}


def dataset():
    """60 steps of made-up numbers that fit Pendulum's spaces, the same bits on every machine."""

    def numbers(*shape: int, factor: int) -> np.ndarray:
        whole = np.arange(np.prod(shape)) * factor % 129 - 64
        return (whole / 64).astype(np.float32).reshape(shape)

    observation = numbers(6, 11, 3, factor=37)  # six episodes of ten steps
    return load_dataset(
        {
            "observations": observation[:, :-1].reshape(60, 3),
            "next_observations": observation[:, 1:].reshape(60, 3),
            "actions": numbers(60, 1, factor=53),
            "rewards": numbers(60, factor=71),
            "terminals": np.arange(60) % 20 == 19,
            "timeouts": np.arange(60) % 20 == 9,
        },
        env="Pendulum-v1",
        reward="raw",
        progress=False,
    )


def trainer(folder: Path) -> OfflineTrainer:
    data = dataset()
    agent = make_agent(IQLConfig(updates=20, seed=3, **CONFIG), data)

    def score():
        return {"return_mean": float(next(agent.actor.parameters()).detach().sum())}

    options = {"log_interval": 5, "eval_interval": 10, "progress_bar": False}
    return OfflineTrainer(agent=agent, dataset=data, evaluation=score, folder=folder, **options)


def weights(agent: Agent) -> list[float]:
    return torch.cat([p.detach().flatten() for p in agent.actor.parameters()]).tolist()


def test_an_old_agent_loads_and_acts():
    agent = Agent.load(FOLDER / "agent.torchrl")
    assert agent.config == IQLConfig(updates=20, seed=3, **CONFIG)
    assert agent.task.action_space.shape == (1,)
    saved = torch.load(io.BytesIO(member_of("agent.torchrl", "loss_module")), weights_only=True)
    actual = agent.state_dict()
    assert set(actual) == set(saved)
    assert all(torch.equal(actual[n], saved[n]) for n in actual if torch.is_tensor(actual[n]))
    observation = np.array([[0.5, -0.25, 1.0]], np.float32)
    action = 2.0 * np.tanh(by_hand(agent, observation))  # Pendulum's bounds are -2 and 2
    np.testing.assert_allclose(agent.act(observation), action, rtol=1e-5)


def member_of(file: str, part: str) -> bytes:
    with zipfile.ZipFile(FOLDER / file) as archive:
        (name,) = (n for n in archive.namelist() if part in n and n.endswith("state.pt"))
        return archive.read(name)


def test_training_continues_from_an_old_checkpoint(tmp_path):
    run = trainer(tmp_path).load_from_file(FOLDER / "agent.torchrl")
    assert run.updates == 10
    assert run.progress.rows == [row for row in EXPECTED["rows"] if row["update"] <= 10]
    run.train()
    assert weights(run.agent) == pytest.approx(EXPECTED["agent"], rel=1e-4, abs=1e-6)
    for row, other in zip(run.progress.rows, EXPECTED["rows"], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_an_old_population_loads_and_continues():
    runs = IQLPopulation.load(FOLDER / "population.torchrl", dataset())
    assert runs.updates == 4
    assert [config.expectile for config in runs.configs] == [0.7, 0.9]
    before = weights(runs.member(0))
    for _ in runs.train(4):
        pass
    for number, values in enumerate(EXPECTED["population"]):
        assert weights(runs.member(number)) == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert before != pytest.approx(EXPECTED["population"][0], rel=1e-4, abs=1e-6)
