"""Many runs on many processes and machines, with one table of results."""

from iql_torchrl.sweep.result import SweepResult
from iql_torchrl.sweep.sweep import Sweep

__all__ = ["Sweep", "SweepResult"]
