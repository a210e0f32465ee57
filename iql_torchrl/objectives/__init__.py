"""IQL losses as TorchRL LossModules."""

from iql_torchrl.objectives.base import OfflineLoss
from iql_torchrl.objectives.discrete import DiscreteIQLLoss
from iql_torchrl.objectives.implicit import DIAGNOSTICS, LOSSES, OPTIONS, ImplicitQLoss
from iql_torchrl.objectives.iql import IQLLoss
from iql_torchrl.objectives.loss_critics import LossCritics

__all__ = [
    "DIAGNOSTICS",
    "LOSSES",
    "OPTIONS",
    "DiscreteIQLLoss",
    "IQLLoss",
    "ImplicitQLoss",
    "LossCritics",
    "OfflineLoss",
]
