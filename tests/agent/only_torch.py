"""A process in which torch is installed and this package, TorchRL and Gymnasium are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

START = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("iql_torchrl", "torchrl", "tensordict", "gymnasium"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11's own reader
import torch
torch.set_num_threads(1)
"""


def run_with_only_torch(script: str, folder: Path) -> str:
    """Run the Python text ``script`` in ``folder``, where torch is imported; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", START + script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
