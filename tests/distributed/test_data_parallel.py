"""Two ranks make the updates that one process makes on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_cases import CASES, trained

from iql_torchrl.distributed import Ranks

SCRIPT = Path(__file__).with_name("rank_cases.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two ranks ended with, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), folder], env=settings, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(results, name):
    alone = trained(CASES[name], Ranks())
    first, second = (result[name] for result in results)
    for part, values in alone.items():
        assert values.keys() == first[part].keys()
        for key, value in values.items():
            assert torch.equal(first[part][key], second[part][key]), (part, key)
            torch.testing.assert_close(
                first[part][key], value, rtol=1e-6, atol=1e-6, equal_nan=True, msg=f"{part} {key}"
            )
