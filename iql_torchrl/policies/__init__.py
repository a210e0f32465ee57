"""Policies pi(a|s) as TorchRL modules whose actions stay inside the action spec.

A policy is made from the number of features that its network reads and the action spec. It reads
``in_keys`` (one name, or a sequence of keys) and writes ``"action"``.
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
