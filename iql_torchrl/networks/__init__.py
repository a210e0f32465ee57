"""Plain networks for IQL, to wrap with TorchRL's ``ValueOperator`` or ``TensorDictModule``."""

from iql_torchrl.networks.chunks import CHUNK_MASK, Chunk, chunk_of, with_chunk
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
    "CHUNK_MASK",
    "HISTORY_MASK",
    "MLP",
    "AroundPerceptron",
    "CausalTransformer",
    "Chunk",
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
    "chunk_of",
    "history_of",
    "join_observations",
    "repeat_first",
    "stack_frames",
    "with_chunk",
    "with_history",
]
