"""Plain networks for IQL, to wrap with TorchRL's ``ValueOperator`` or ``TensorDictModule``."""

from iql_torchrl.networks.encoders import Flatten, ImageEncoder, JoinedEncoders, OneHots
from iql_torchrl.networks.perceptrons import (
    ACTIVATIONS,
    MLP,
    Critic,
    DiscreteCritic,
    OneHot,
    ResidualMLP,
    Standardise,
    StateValue,
    first_layer,
    join_observations,
    perceptron,
)

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Critic",
    "DiscreteCritic",
    "Flatten",
    "ImageEncoder",
    "JoinedEncoders",
    "OneHot",
    "OneHots",
    "ResidualMLP",
    "Standardise",
    "StateValue",
    "first_layer",
    "join_observations",
    "perceptron",
]
