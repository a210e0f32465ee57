"""What a dataset prints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from small_agents import log

from iql_torchrl import load_dataset


def test_a_dataset_is_four_lines_and_mapped_rewards_and_notes_are_named():
    rows = {name: values[:4] for name, values in log(action=np.arange(40) % 4).items()}
    rows["reward"] = np.array([1.0, 2.0, 3.0, 4.5])
    rows["truncated"] = np.array([False, True, False, True])
    assert repr(replace(load_dataset(rows), name="four", notes=())).splitlines() == [
        "OfflineDataset 'four': 4 transitions in 2 episodes",
        "  observation: Box of shape (3,), float32, [-inf, inf]",
        "  action: Discrete(4)",
        "  raw return: mean 5.25, 3 to 7.5",
    ]
    text = repr(replace(load_dataset(rows, reward=(2.0, -1.0)), notes=("a", "b")))
    assert "mean 5.25, 3 to 7.5, rewards mapped by RewardMap(scale=2.0, shift=-1.0)" in text
    assert text.endswith("  notes: 2, see print_notes()")
