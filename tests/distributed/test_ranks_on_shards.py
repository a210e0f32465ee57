"""Two ranks that read the same shards make the updates of one process."""

from __future__ import annotations

import pytest
import torch
from shard_cases import trained
from shard_logs import written
from two_ranks import run_ranks

from iql_torchrl.distributed import Ranks

pytestmark = pytest.mark.slow  # two processes that import torch


def test_two_ranks_on_shards(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        written(tmp_path / str(number), [7, 3, 12, 5, 5, 9, 2, 8, 6, 11], 5, seed=number)
    first, second = run_ranks("shard_cases.py", tmp_path)
    alone = trained(Ranks(), tmp_path / "0" / "shards")
    assert first["loaded"] == second["loaded"] == alone["loaded"]
    for name, values in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], values, rtol=1e-4, atol=1e-5)
    for rank in (first, second):
        assert rank["data"].startswith("ValueError: the ranks have different data: their datasets'")
        assert rank["rotation"].startswith("ValueError: the ranks' replay buffers would draw")
