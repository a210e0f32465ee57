"""Policies pi(a|s) as TorchRL modules that stay inside the action spec.

Every policy is made from the number of features its network reads and the action spec; it is an
actor that reads ``in_keys`` (one name, or a sequence of keys) and writes ``"action"``.
Deterministic and random interaction types both work.
"""

from iql_torchrl.policies.actors import (
    categorical,
    deterministic,
    gaussian,
    mixture,
    tanh_normal,
)
from iql_torchrl.policies.distributions import (
    Choice,
    ClippedGaussian,
    ClippedMixture,
    OneHotChoice,
    SquashedGaussian,
)
from iql_torchrl.policies.generative import (
    BestOf,
    EncodedPolicy,
    FlowHead,
    FlowPolicy,
    best_of,
    encoded,
    flow,
    guided,
)

__all__ = [
    "BestOf",
    "Choice",
    "ClippedGaussian",
    "ClippedMixture",
    "EncodedPolicy",
    "FlowHead",
    "FlowPolicy",
    "OneHotChoice",
    "SquashedGaussian",
    "best_of",
    "categorical",
    "deterministic",
    "encoded",
    "flow",
    "gaussian",
    "guided",
    "mixture",
    "tanh_normal",
]
