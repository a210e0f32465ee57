"""Compiled and captured updates on two ranks, and an example under torchrun; these take minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_cases import CASE, calls_by_hand
from rank_cases import trained
from two_ranks import run_ranks

from iql_torchrl.data.builtin import make_dataset
from iql_torchrl.distributed import Ranks

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "iql_offline.py"
TINY = "--updates 20 --hidden 8 --batch-size 16 --episodes 2 --final-episodes 3 --eval-every 10"

pytestmark = pytest.mark.slow


def test_compiled_and_captured_updates_of_two_ranks_are_eager_ones_of_one_process(tmp_path):
    alone = {"compiled": trained(CASE, Ranks()), "captured": calls_by_hand()}
    first, second = run_ranks("compiled_cases.py", tmp_path)
    for form, part in ((f, p) for f in alone for p in ("state", "metrics")):
        for key, value in alone[form][part].items():
            found = first[form][part][key]
            assert torch.equal(found, second[form][part][key]), (form, key)
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9, msg=f"{form} {key}")


def test_the_main_example_under_torchrun_writes_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    make_dataset("pendulum/mixed-v0", episodes=8, progress=False)
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(EXAMPLE)]
    done = subprocess.run(
        [*launch, *TINY.split(), "--name", "two"],
        cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("behaviour cloning: updates 0 to 20") == 1  # rank 0 alone prints
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]
    run = tmp_path / "runs" / "two" / "IQL"
    assert {"metrics.csv", "best.torchrl", "policy.pt2"} <= {path.name for path in run.iterdir()}
