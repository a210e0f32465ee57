"""Starting a script as two ranks of a gloo group, whose store is a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch


def run_ranks(script: str, folder: Path) -> list[dict]:
    """What each rank of ``script`` in this folder saved, by rank."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    path = Path(__file__).with_name(script)
    started = [
        subprocess.Popen(
            [sys.executable, path, str(rank), folder],
            env=settings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
