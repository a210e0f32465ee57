"""The generated CUDA programs, executed by Triton's interpreter: they make the plain step's updates."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = ("sequential", "simultaneous", "everything")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_programs_make_the_plain_steps_updates():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "benchmarks" / "interpret_kernels.py"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    differences = dict(re.findall(r"^(\w+) +(\S+) of the movement$", ran.stdout, re.MULTILINE))
    assert set(differences) == set(CASES)
    assert all(float(value) < 1e-3 for value in differences.values()), differences
