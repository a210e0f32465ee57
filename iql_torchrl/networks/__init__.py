"""Plain networks for IQL, to wrap with TorchRL's ``ValueOperator`` or ``TensorDictModule``."""

from iql_torchrl.networks.encoders import Flatten, ImageEncoder, JoinedEncoders, OneHots
from iql_torchrl.networks.history import (
    HISTORY_MASK,
    History,
    history_of,
    repeat_first,
    stack_frames,
    with_history,
)
from iql_torchrl.networks.perceptrons import (
    ACTIVATIONS,
    MLP,
    AroundPerceptron,
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
from iql_torchrl.networks.sequences import CausalTransformer, LSTMEncoder

__all__ = [
    "ACTIVATIONS",
    "HISTORY_MASK",
    "MLP",
    "AroundPerceptron",
    "CausalTransformer",
    "Critic",
    "DiscreteCritic",
    "Flatten",
    "History",
    "ImageEncoder",
    "JoinedEncoders",
    "LSTMEncoder",
    "OneHot",
    "OneHots",
    "ResidualMLP",
    "Standardise",
    "StateValue",
    "first_layer",
    "history_of",
    "join_observations",
    "perceptron",
    "repeat_first",
    "stack_frames",
    "with_history",
]
