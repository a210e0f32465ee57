"""IQL losses as TorchRL LossModules, and their objectives."""

from iql_torchrl.losses.actor_objectives import (
    ACTOR_OBJECTIVES,
    DDPGBC,
    UNWEIGHTED,
    ActorObjective,
    AdvantageWeighted,
    ConditionedFlow,
    FlowMatching,
    WeightedFunction,
    WeightedRegression,
    WeightedSquaredError,
)
from iql_torchrl.losses.batch import Batch
from iql_torchrl.losses.critics import LossCritics
from iql_torchrl.losses.discrete import DiscreteIQLLoss
from iql_torchrl.losses.encoder import SharedEncoder
from iql_torchrl.losses.iql import DIAGNOSTICS, LOSSES, IQLLoss
from iql_torchrl.losses.objective import Objective
from iql_torchrl.losses.value_objectives import (
    VALUE_OBJECTIVES,
    Expectile,
    Exponential,
    Gumbel,
    Quantile,
    SarsaExpectile,
    Sparse,
    ValueFunction,
    ValueObjective,
)

__all__ = [
    "ACTOR_OBJECTIVES",
    "DDPGBC",
    "DIAGNOSTICS",
    "LOSSES",
    "UNWEIGHTED",
    "VALUE_OBJECTIVES",
    "ActorObjective",
    "AdvantageWeighted",
    "Batch",
    "ConditionedFlow",
    "DiscreteIQLLoss",
    "Expectile",
    "Exponential",
    "FlowMatching",
    "Gumbel",
    "IQLLoss",
    "LossCritics",
    "Objective",
    "Quantile",
    "SarsaExpectile",
    "SharedEncoder",
    "Sparse",
    "ValueFunction",
    "ValueObjective",
    "WeightedFunction",
    "WeightedRegression",
    "WeightedSquaredError",
]
