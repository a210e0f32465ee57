"""An agent with a dataset that it was not made for."""

from __future__ import annotations

import numpy as np
import pytest
from small_agents import config, log
from torchrl import torchrl_logger

from iql_torchrl import OfflineTrainer, load_dataset, make_agent


@pytest.mark.parametrize(
    ("asked", "loaded", "lines"),
    [("return_range", "raw", 1), ("raw", (2.0, 0.0), 1), ("raw", "raw", 0), ("minus_one", -1, 0)],
)
def test_a_config_of_another_reward_is_reported(asked, loaded, lines, caplog):
    reward = (1.0, -1.0) if loaded == -1 else loaded
    dataset = load_dataset(log(), reward=reward)
    agent = make_agent(config(reward=asked), dataset)
    with caplog.at_level("WARNING", logger="torchrl"):
        torchrl_logger.addHandler(caplog.handler)
        try:
            OfflineTrainer(agent=agent, dataset=dataset, total_updates=1, progress_bar=False)
        finally:
            torchrl_logger.removeHandler(caplog.handler)
    assert len(caplog.messages) == lines
    for line in caplog.messages:
        assert line.startswith(f"config.reward is '{asked}' and the rewards of ")


def observations(width: int, dtype: type = np.float32):
    return np.random.default_rng(1).normal(size=(40, width)).astype(dtype)


@pytest.mark.parametrize(
    ("own", "given", "key", "words"),
    [
        ({}, {"observation": observations(5)}, "observation", r"Box.*\(3,\).*Box of shape \(5,\)"),
        ({}, {"action": np.full((40, 3), 0.5, "f4")}, "action", r"Box.*\(2,\).*Box of shape \(3,\)"),
        ({}, {"action": np.arange(40) % 4}, "action", r"Box of shape \(2,\).*Discrete\(4\)"),
        ({"action": np.arange(40) % 4}, {"action": np.arange(40) % 5}, "action",
         r"Discrete\(4\).*Discrete\(5\)"),
    ],
)  # fmt: skip
def test_a_dataset_of_other_shapes_or_categories_is_refused_at_once(own, given, key, words):
    agent = make_agent(config(), load_dataset(log(**own)))
    with pytest.raises(ValueError, match=rf"^{key}: the agent was made for {words}.*make_agent"):
        OfflineTrainer(agent=agent, dataset=load_dataset(log(**given)), progress_bar=False)


def test_other_rows_of_the_same_shapes_are_taken():
    agent = make_agent(config(), load_dataset(log()))
    other = load_dataset(log(observation=observations(3)))
    OfflineTrainer(agent=agent, dataset=other, total_updates=2, progress_bar=False).train()
