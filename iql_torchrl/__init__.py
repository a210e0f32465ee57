"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv:2110.06169) for TorchRL."""

import os

# Threads of libgomp that wait for each other spin; where another process has the core, an update of
# small networks is up to 100 times slower (table in benchmarks/README.md). libgomp reads this
# variable when torch is imported. Processes that this one starts inherit it.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "2000"

from iql_torchrl import functional, networks, policies
from iql_torchrl.agent.build import Agent, make_agent
from iql_torchrl.config import PRESETS, IQLConfig
from iql_torchrl.data import DatasetError, OfflineDataset, load_dataset
from iql_torchrl.evaluation.background import BackgroundEvaluation
from iql_torchrl.evaluation.result import Evaluation
from iql_torchrl.evaluation.rollout import evaluate
from iql_torchrl.evaluation.video import record_video
from iql_torchrl.losses import DiscreteIQLLoss, IQLLoss
from iql_torchrl.population import IQLPopulation
from iql_torchrl.selection import fitted_q_evaluation, importance_sampling, rank_policies
from iql_torchrl.trainers.trainer import OfflineTrainer
from iql_torchrl.update.captured import captured
from iql_torchrl.update.compiled import compiled
from iql_torchrl.update.step import IQLStep

__all__ = [
    "PRESETS",
    "Agent",
    "BackgroundEvaluation",
    "DatasetError",
    "DiscreteIQLLoss",
    "Evaluation",
    "IQLConfig",
    "IQLLoss",
    "IQLPopulation",
    "IQLStep",
    "OfflineDataset",
    "OfflineTrainer",
    "captured",
    "compiled",
    "evaluate",
    "fitted_q_evaluation",
    "functional",
    "importance_sampling",
    "load_dataset",
    "make_agent",
    "networks",
    "policies",
    "rank_policies",
    "record_video",
]
