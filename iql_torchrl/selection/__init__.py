"""Choosing among trained policies from a dataset alone, without an environment."""

from iql_torchrl.selection.estimators import Importance, importance_sampling
from iql_torchrl.selection.fitted_q import FittedQ, fitted_q_evaluation
from iql_torchrl.selection.ranking import Ranking, rank_policies

__all__ = [
    "FittedQ",
    "Importance",
    "Ranking",
    "fitted_q_evaluation",
    "importance_sampling",
    "rank_policies",
]
