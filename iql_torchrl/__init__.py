"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv:2110.06169) for TorchRL."""

from iql_torchrl import functional
from iql_torchrl.objectives import DiscreteIQLLoss, IQLLoss

__all__ = ["DiscreteIQLLoss", "IQLLoss", "functional"]
