"""IQL losses as TorchRL LossModules."""

from iql_torchrl.objectives.base import OfflineLoss
from iql_torchrl.objectives.discrete import DiscreteIQLLoss
from iql_torchrl.objectives.iql import DIAGNOSTICS, LOSSES, OPTIONS, ImplicitQLoss, IQLLoss
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
