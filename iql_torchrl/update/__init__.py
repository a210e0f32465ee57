"""One gradient update, eager, compiled and captured.

The functions are ``iql_torchrl.compiled`` and ``iql_torchrl.captured``; here these names are modules.
"""

from iql_torchrl.update.captured import CapturedStep
from iql_torchrl.update.compiled import CompiledStep
from iql_torchrl.update.step import IQLStep

__all__ = ["CapturedStep", "CompiledStep", "IQLStep"]
