"""IQL losses as TorchRL LossModules."""

from iql_torchrl.losses.critics import LossCritics
from iql_torchrl.losses.iql import DiscreteIQLLoss, IQLLoss
from iql_torchrl.losses.loss import DIAGNOSTICS, LOSSES, UNWEIGHTED, ImplicitQLoss

__all__ = [
    "DIAGNOSTICS",
    "LOSSES",
    "UNWEIGHTED",
    "DiscreteIQLLoss",
    "IQLLoss",
    "ImplicitQLoss",
    "LossCritics",
]
