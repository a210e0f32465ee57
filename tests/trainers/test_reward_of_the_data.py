"""A config that names another reward map than the data have."""

from __future__ import annotations

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
