"""Implicit Q-Learning for critics with one value per action."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import unravel_key
from torch import Tensor, distributions, nn
from torchrl.data.tensor_specs import Composite, TensorSpec
from torchrl.data.utils import ACTION_SPACE_MAP
from torchrl.modules import MaskedOneHotCategorical, OneHotCategorical

from iql_torchrl import functional as F
from iql_torchrl.losses.actor_objectives import ActorObjective
from iql_torchrl.losses.batch import Batch
from iql_torchrl.losses.critics import Critics
from iql_torchrl.losses.iql import IQLLoss

ONE_HOT_DISTRIBUTIONS = (
    OneHotCategorical,
    MaskedOneHotCategorical,
    distributions.OneHotCategorical,
)


class DiscreteIQLLoss(IQLLoss):
    """IQL when the critic returns one value per action: ``(*B, N)``, N >= 2.

    The dataset action is an index, ``(*B,)`` or ``(*B, 1)``, or one-hot ``(*B, N)``, whatever the
    policy's distribution takes. All else is :class:`IQLLoss`'s.

    Keyword Args:
        action_space: ``"categorical"``, ``"one-hot"`` or a TorchRL spec; documents the data, which
            is recognised by shape in any case. Other spaces are refused with ``ValueError``.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: Critics,
        value_network: TensorDictModule,
        *,
        action_space: str | TensorSpec | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(actor_network, qvalue_network, value_network, **kwargs)
        if action_space is not None and not isinstance(action_space, str | TensorSpec):
            raise TypeError(
                f"action_space is {action_space!r}; choose 'categorical' or 'one-hot', or pass a "
                "TorchRL spec: dataset.action_spec."
            )
        self.action_space = _name_of(action_space or "categorical")
        if self.action_space not in ("categorical", "one_hot"):
            raise ValueError(
                f"action_space is {action_space!r}; choose 'categorical' or 'one-hot': one action "
                "out of N per step."
            )

    def check_actor_objective(self, objective: ActorObjective) -> None:
        super().check_actor_objective(objective)
        if objective.needs_continuous_actions:
            raise ValueError(
                f"actor_objective={type(objective).__name__} needs continuous actions; these are "
                "discrete."
            )

    def pick(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.pick_action(outputs, batch.data.get(self.tensor_keys.action), leading=1)

    def dataset_action(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        action = batch.data.get(self.tensor_keys.action)
        dims = len(dist.batch_shape)
        is_one_hot = action.ndim > dims and action.shape[-1] > 1
        if isinstance(dist, ONE_HOT_DISTRIBUTIONS):
            if is_one_hot:
                return action.long() if action.dtype == torch.bool else action
            index = action if action.ndim == dims else action.squeeze(-1)
            return nn.functional.one_hot(index.long(), dist.param_shape[-1])
        if is_one_hot:
            return action.long().argmax(-1)
        return action if action.ndim == dims else action.squeeze(-1)


def _name_of(action_space: str | TensorSpec) -> str | None:
    """TorchRL's name of an action space, None where it has none."""
    if isinstance(action_space, Composite):
        leaves = {unravel_key(key): spec for key, spec in action_space.items(True, True)}
        action_space = leaves.get("action", action_space)
    space = type(action_space) if isinstance(action_space, TensorSpec) else action_space
    name: str | None = ACTION_SPACE_MAP.get(space)
    return name
