"""Policies in environments: rollouts, their results and statistics, background processes, video."""

from iql_torchrl.evaluation.acting import Acting
from iql_torchrl.evaluation.background import BackgroundEvaluation
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.evaluation.rollout import evaluate
from iql_torchrl.evaluation.value_gap import ValueGap, value_gap
from iql_torchrl.evaluation.video import record_video

__all__ = [
    "Acting",
    "BackgroundEvaluation",
    "Evaluation",
    "ValueGap",
    "evaluate",
    "record_video",
    "value_gap",
]
