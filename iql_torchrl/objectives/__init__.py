"""IQL losses as TorchRL LossModules."""

from iql_torchrl.objectives.iql import DiscreteIQLLoss, IQLLoss
from iql_torchrl.objectives.loss import DIAGNOSTICS, LOSSES, OPTIONS, ImplicitQLoss
from iql_torchrl.objectives.loss_critics import LossCritics

__all__ = [
    "DIAGNOSTICS",
    "LOSSES",
    "OPTIONS",
    "DiscreteIQLLoss",
    "IQLLoss",
    "ImplicitQLoss",
    "LossCritics",
]
