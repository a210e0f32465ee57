"""Named configs with their sources."""

from __future__ import annotations

from types import MappingProxyType

from iql_torchrl.config.iql_config import IQLConfig

__all__ = ["PRESETS"]

#: ``quick`` learns small tasks in about a minute on two cores. ``adamw_cosine`` is not from a
#: publication: AdamW without decay, and all rates on one cosine of a hundred steps (torch's
#: ``CosineAnnealingLR`` with ``T_max=100``, stepped a hundred times over the run).
#:
#: The others are the official code's for D4RL's tasks, read in
#: https://github.com/ikostrikov/implicit_q_learning at commit 09d7002: ``configs/mujoco_config.py``
#: (locomotion), ``configs/antmaze_config.py``, ``configs/kitchen_config.py`` (kitchen and, by its
#: README, Adroit); ``train_offline.py`` (batch size, updates, and the reward maps it applies to
#: locomotion and AntMaze); ``learner.py`` (Adam, cosine for the policy alone, order of the update);
#: ``actor.py`` (ceiling 100). It standardises nothing. Its default seed is 42.
PRESETS = MappingProxyType(
    {
        "quick": IQLConfig(
            updates=10_000, hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3
        ),
        "adamw_cosine": IQLConfig(
            discount=0.97,
            temperature=2.0,
            reward="raw",
            optimizer="adamw",
            actor_lr=1e-4,
            critic_lr=1e-3,
            value_lr=1e-3,
            schedule="cosine",
            schedule_steps=100,
        ),
        "locomotion": IQLConfig(standardise=False),
        "antmaze": IQLConfig(
            expectile=0.9, temperature=10.0, reward="minus_one", standardise=False
        ),
        "kitchen": IQLConfig(temperature=0.5, dropout=0.1, reward="raw", standardise=False),
        "adroit": IQLConfig(temperature=0.5, dropout=0.1, reward="raw", standardise=False),
    }
)
