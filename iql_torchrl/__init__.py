"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv:2110.06169) for TorchRL."""

from iql_torchrl import functional, networks, policies
from iql_torchrl.objectives import DiscreteIQLLoss, IQLLoss
from iql_torchrl.step import IQLStep, compiled

__all__ = [
    "DiscreteIQLLoss",
    "IQLLoss",
    "IQLStep",
    "compiled",
    "functional",
    "networks",
    "policies",
]
