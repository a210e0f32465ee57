"""Training that is really killed, and goes on as if it had not been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_resume.py"


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_runs_equal_an_undisturbed_run(tmp_path, kills):
    path = tmp_path / "table.json"
    arguments = ["--kills", str(kills), "--updates", "200", "--seed", "1", "--output", str(path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(path.read_text())["trials"]
    assert len(trials) == kills
    assert all(trial["equal"] for trial in trials)
