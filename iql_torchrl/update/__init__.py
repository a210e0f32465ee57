"""One gradient update, eager, compiled and captured."""

from iql_torchrl.update.captured import CapturedStep, captured
from iql_torchrl.update.compiled import CompiledStep, compiled
from iql_torchrl.update.step import IQLStep

__all__ = [
    "CapturedStep",
    "CompiledStep",
    "IQLStep",
    "captured",
    "compiled",
]
