"""Policies pi(a|s) as TorchRL modules that stay inside the action spec.

Every builder takes the number of features its network reads and the action spec, and returns an
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
from iql_torchrl.policies.best_of import BestOf, best_of
from iql_torchrl.policies.distributions import (
    Choice,
    ClippedGaussian,
    ClippedMixture,
    OneHotChoice,
    SquashedGaussian,
)
from iql_torchrl.policies.encoded import EncodedPolicy, encoded
from iql_torchrl.policies.flow import FlowHead, FlowPolicy, flow

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
    "mixture",
    "tanh_normal",
]
