"""Named configs with their sources."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NoReturn

from iql_torchrl.config.iql_config import IQLConfig

__all__ = ["PRESETS"]


class _Named(dict[str, IQLConfig]):
    """Presets by name; an unknown name is a ``KeyError`` that lists them."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"there is no preset {name!r}; the presets are {', '.join(self)}.")


# The official code of IQL standardises nothing and draws orthogonal weights.
OFFICIAL: dict[str, Any] = {"standardise": False, "initialisation": "orthogonal"}

# Settings that FQL's paper and code share among their methods.
FQL: dict[str, Any] = {
    "expectile": 0.9,
    "reward": "raw",
    "standardise": False,
    "initialisation": "orthogonal",
    "hidden": (512, 512, 512, 512),
    "activation": "gelu",
    "layer_norm": True,
    "norm_after_activation": True,
    "schedule": "constant",
    "order": "simultaneous",
}

#: ``quick`` learns small tasks in about a minute on two cores. ``adamw_cosine`` is not from a
#: publication: AdamW without decay, and all rates on one cosine of a hundred steps (torch's
#: ``CosineAnnealingLR`` with ``T_max=100``, stepped a hundred times over the run).
#:
#: The others are the official code's for D4RL's tasks, read in
#: https://github.com/ikostrikov/implicit_q_learning at commit 09d7002: ``configs/mujoco_config.py``
#: (locomotion), ``configs/antmaze_config.py``, ``configs/kitchen_config.py`` (kitchen and, by its
#: README, Adroit); ``train_offline.py`` (batch size, updates, and the reward maps it applies to
#: locomotion and AntMaze); ``learner.py`` (Adam, cosine for the policy alone, order of the update);
#: ``actor.py`` (ceiling 100); ``common.py`` (orthogonal weights). It standardises nothing. Its
#: default seed is 42.
#:
#: ``ogbench`` and ``ifql`` are IQL and IFQL for the single-task data of OGBench, with states as
#: observations: Park, Li, Levine 2025, "Flow Q-Learning" (arXiv:2502.02538), appendix E, and
#: https://github.com/seohongpark/fql at commit 719d044: ``agents/iql.py``, ``agents/ifql.py`` (Adam
#: with 3e-4, batches of 256, four layers of 512 with GELU, layer normalisation after the activation
#: in the critics and in V, polyak 0.005, expectile 0.9, one gradient of all losses; 10 Euler steps,
#: 32 candidates), ``main.py`` (1,000,000 updates). The temperature of IQL, 10, is its default; the
#: paper tunes it for each task, and takes a discount of 0.995 for some. Not taken over: its initial
#: weights (uniform, by the mean of fan-in and fan-out), its constant standard deviation, and the live
#: critics in the weights of IQL.
PRESETS = MappingProxyType(
    _Named(
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
            "locomotion": IQLConfig(**OFFICIAL),
            "antmaze": IQLConfig(expectile=0.9, temperature=10.0, reward="minus_one", **OFFICIAL),
            "kitchen": IQLConfig(temperature=0.5, dropout=0.1, reward="raw", **OFFICIAL),
            "adroit": IQLConfig(temperature=0.5, dropout=0.1, reward="raw", **OFFICIAL),
            "ogbench": IQLConfig(temperature=10.0, **FQL),
            "ifql": IQLConfig(temperature=0.0, policy="flow", flow_steps=10, num_samples=32, **FQL),
        }
    )
)
