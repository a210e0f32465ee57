"""IQL losses as TorchRL LossModules."""

from iql_torchrl.objectives.base import OfflineLoss
from iql_torchrl.objectives.discrete import DiscreteIQLLoss
from iql_torchrl.objectives.iql import DIAGNOSTICS, LOSSES, OPTIONS, ImplicitQLoss, IQLLoss

__all__ = [
    "DIAGNOSTICS",
    "LOSSES",
    "OPTIONS",
    "DiscreteIQLLoss",
    "IQLLoss",
    "ImplicitQLoss",
    "OfflineLoss",
]
