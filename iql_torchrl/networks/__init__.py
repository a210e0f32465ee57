"""Plain networks for IQL, to wrap with TorchRL's ``ValueOperator`` or ``TensorDictModule``."""

from iql_torchrl.networks.encoders import Flatten, ImageEncoder, JoinedEncoders, OneHot, OneHots
from iql_torchrl.networks.perceptrons import (
    ACTIVATIONS,
    MLP,
    AroundPerceptron,
    Critic,
    DiscreteCritic,
    ResidualMLP,
    Standardise,
    StateValue,
    join_observations,
)
from iql_torchrl.networks.sequences import (
    HISTORY_MASK,
    CausalTransformer,
    History,
    LSTMEncoder,
    history_of,
    repeat_first,
    stack_frames,
    with_history,
)

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
    "history_of",
    "join_observations",
    "repeat_first",
    "stack_frames",
    "with_history",
]
