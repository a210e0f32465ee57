"""The losses of P runs as one loss over stacked parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torchrl.objectives.common import LossModule
from torchrl.objectives.value import TD0Estimator

from iql_torchrl import functional as F
from iql_torchrl.fast_networks.detect import DirectActor, is_head_and_distribution, writes
from iql_torchrl.fast_networks.stacked import (
    StackedNetwork,
    check_networks,
    check_same,
    perceptron_keys,
)
from iql_torchrl.host import children_of
from iql_torchrl.objectives.batch import Batch, agree, per_sample
from iql_torchrl.objectives.ensembles import SharedLeaves
from iql_torchrl.objectives.iql import DiscreteIQLLoss, ImplicitQLoss, IQLLoss

__all__ = ["PopulationLoss"]

SAME = (
    "actor_objective",
    "delay_qvalue",
    "deactivate_vmap",
    "diagnostics",
    "deterministic_sampling_mode",
    "loss_function",
    "loss_mask_key",
    "num_qvalue_nets",
    "reduction",
    "scalar_output_mode",
    "use_prioritized_weights",
    "value_objective",
)
NETWORKS = ("actor_network", "qvalue_network", "value_network")


class PopulationLoss(ImplicitQLoss):
    """P losses over stacked parameters: every loss and scalar has shape ``(P,)``.

    Batches are ``(B,)``, seen by every run, or ``(P, B)``, one each. ``expectile``, ``temperature``,
    ``max_weight`` and the discount are each run's own. The sum of the P losses trains each run as
    if it were alone: no parameter is shared.

    Args:
        losses: one :class:`IQLLoss` or :class:`DiscreteIQLLoss` a run, alike in everything but
            knobs and weights; copied.

    Raises:
        ValueError: losses that differ in kind, networks, keys or choices; networks that share
            parameters or cannot be stacked (``fast_networks.stacked.perceptron_keys``);
            estimators other than TD(0).
        TypeError: losses of another kind, classes derived from the two included.
    """

    expectile: Any
    temperature: Any
    max_weight: Any
    discount: Tensor

    def __init__(self, losses: Sequence[ImplicitQLoss]) -> None:
        if not losses:
            raise ValueError("losses is empty; a population has at least one run.")
        LossModule.__init__(self)  # the networks are converted already
        first = losses[0]
        _check_alike(losses)
        self._in_keys = None
        self.members = len(losses)
        for name in SAME:
            setattr(self, "_diagnostics" if name == "diagnostics" else name, getattr(first, name))
        self._kind = DiscreteIQLLoss if isinstance(first, DiscreteIQLLoss) else IQLLoss
        self.out_keys = list(first.out_keys)
        self._optional_keys = set(first._optional_keys)
        self._shared = SharedLeaves(detach=False)
        self._tensor_keys = copy.copy(first.tensor_keys)
        self._stack(losses)
        like = next(first.parameters())
        for name in ("expectile", "temperature", "max_weight"):
            values = torch.tensor(
                [float(getattr(loss, name)) for loss in losses], dtype=torch.float64
            )
            self.register_buffer(name, values.to(like).unsqueeze(-1), persistent=False)
        discount = torch.stack([loss.value_estimator.gamma.reshape(()) for loss in losses])
        discount = discount.to(like.device).unsqueeze(-1)
        self.register_buffer("discount", discount, persistent=False)
        self.make_value_estimator(gamma=float(discount[0]))
        self.value_estimator.set_keys(**vars(first.value_estimator.tensor_keys))
        self.register_load_state_dict_post_hook(_forget_networks)

    def _stack(self, losses: Sequence[ImplicitQLoss]) -> None:
        first = losses[0]
        for name in NETWORKS:
            network = getattr(first, name)
            self.__dict__[name] = copy.deepcopy(network)  # as LossModule holds them
            inside = perceptron_keys(name, network)
            self._has_update_associated[name] = False
            for prefix in ("", "target_"):
                stacks: list[Any] = [
                    children_of(loss).get(f"{prefix}{name}_params") for loss in losses
                ]
                if stacks[0] is None:
                    continue
                stacked: Any = torch.stack([params.data for params in stacks]).contiguous()
                for key in list(stacked.keys(True, True)):
                    leaf = stacked.get(key)
                    buffer = not prefix and not stacks[0].get(key).requires_grad
                    if key not in inside and not _is_buffer(network, key):
                        leaf = leaf.unsqueeze(1)
                    stacked.set(key, leaf if prefix or buffer else nn.Parameter(leaf))
                setattr(self, f"{prefix}{name}_params", TensorDictParams(stacked, no_convert=True))

    def write_member(self, number: int, loss: ImplicitQLoss) -> None:
        """Copy run ``number``'s weights, targets too, into an ordinary loss of the same shapes."""
        with torch.no_grad():
            for name, stacked in children_of(self).items():
                if isinstance(stacked, TensorDictParams):
                    for key, leaf in children_of(loss)[name].items(True, True):
                        leaf.data.copy_(stacked.get(key)[number].reshape(leaf.shape))

    # -- networks --------------------------------------------------------------------------------

    def _bind(self) -> Any:
        return _Networks(self)

    def _networks(self) -> _Networks:
        if self._kept is None:
            self._kept = self._bind()
        kept: Any = self._kept
        if self._bound is None:
            kept.follow_modes()
        return kept

    def reset_parameters_recursive(self) -> None:
        raise NotImplementedError(
            "a population's weights are drawn run by run: reset the losses it is made from, and "
            "build it again."
        )

    def read(self, tensordict: TensorDictBase) -> Batch:
        batch = super().read(tensordict)
        shape = batch.data.batch_size
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != self.members):
            raise ValueError(
                f"the batch has shape {tuple(shape)}; wanted (B,) for all {self.members} runs or "
                f"({self.members}, B)."
            )
        if len(shape) == 2:
            return batch
        mask, weight = (
            None if entry is None else entry.expand(self.members, *shape)
            for entry in (batch.mask, batch.weight)
        )
        return Batch(batch.data, mask, weight)

    def state_value(self, batch: Batch) -> Tensor:
        return self._networks().value(batch.data).squeeze(-1)

    def state_values(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            return self.state_value(batch), None

    def critic_outputs(self, batch: Batch, params: TensorDictBase) -> Tensor:
        """``(K, P, B, n)``."""
        out = self._networks().critics[id(params)](batch.data)
        return out.unsqueeze(0) if self.num_qvalue_nets == 1 else out.transpose(0, 1)

    def action_values(self, batch: Batch, params: TensorDictBase) -> Tensor:
        outputs = self.critic_outputs(batch, params)
        if self._kind is IQLLoss:
            return outputs.squeeze(-1)
        leading = outputs.ndim - 1 - batch.data.ndim
        action = batch.data.get(self.tensor_keys.action)
        return F.pick_action(outputs, action, leading=leading)

    def target_qvalue(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.action_values(
                batch, children_of(self)["target_qvalue_network_params"]
            ).amin(0)

    def td_target(self, batch: Batch, next_value: Tensor | None = None) -> Tensor:
        data, keys = batch.data, self.value_estimator.tensor_keys
        with torch.no_grad():
            reward, terminated = (
                per_sample(data.get(("next", key)), data.batch_size, ("next", key))
                for key in (keys.reward, keys.terminated)
            )
            gamma = self.discount
            steps = data.get(keys.steps_to_next_obs, None)
            if steps is not None:
                gamma = gamma ** per_sample(steps, data.batch_size, keys.steps_to_next_obs)
            following = self.state_value(batch.next)
            one = following if data.ndim == 2 else following[0]
            agree(reward=reward, terminated=terminated, next_state_value=one)
            return F.td_target(reward, following, terminated, gamma=gamma)

    def _actor_error(self, batch: Batch) -> Tensor:
        actor = self._networks().actor
        action = self._action(batch)
        dist = actor.get_dist(batch.data)
        if self.actor_objective == "mse":
            distance: Tensor = (dist.deterministic_sample - action).square().sum(-1)
            return distance
        data = TensorDict({self.tensor_keys.action: action})
        logged = self._kind.logged_action(self, Batch(data, None, None), dist)
        error: Tensor = -dist.log_prob(logged)
        return error

    def _action(self, batch: Batch) -> Tensor:
        action = batch.data.get(self.tensor_keys.action)
        return action if batch.data.ndim == 2 else action.expand(self.members, *action.shape)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`actor_term` of a batch, to which nothing is written."""
        batch = self.read(tensordict)
        with torch.no_grad():
            advantage = self.target_qvalue(batch) - self.state_value(batch)
        return self.actor_term(batch, advantage)

    # -- one mean a run --------------------------------------------------------------------------

    def _samples(self, value: Tensor) -> Sequence[int]:
        return tuple(range(1, value.ndim))

    def outputs(
        self, tensordict: TensorDictBase, losses: dict[str, Tensor], summary: dict[str, Tensor]
    ) -> TensorDictBase:
        """Losses and scalars, each ``(P,)``; the batch, which many runs read, is not written to."""
        scalars = {k: v for k, v in summary.items() if k not in ("priority", "log_prob")}
        return TensorDict(losses | scalars, batch_size=[self.members])


class _Networks:
    """A population's networks over its stacked parameters."""

    def __init__(self, loss: PopulationLoss) -> None:
        params: Any = children_of(loss)
        self.value = StackedNetwork(
            "value_network", loss.value_network, params["value_network_params"]
        )
        self.critics = {
            id(params[name]): StackedNetwork("qvalue_network", loss.qvalue_network, params[name])
            for name in ("qvalue_network_params", "target_qvalue_network_params")
        }
        policy = StackedNetwork("actor_network", loss.actor_network, params["actor_network_params"])
        self.actor = DirectActor(policy.module)
        self._all = [self.value, *self.critics.values(), policy]

    def follow_modes(self) -> None:
        for network in self._all:
            network.follow_modes()


def _is_buffer(network: nn.Module, key: NestedKey) -> bool:
    name = key if isinstance(key, str) else ".".join(key)
    return name in {name for name, _ in network.named_buffers()}


def _forget_networks(loss: PopulationLoss, _: Any) -> None:
    loss._kept = None


def _check_alike(losses: Sequence[ImplicitQLoss]) -> None:
    first = losses[0]
    for number, loss in enumerate(losses):
        if type(loss) not in (IQLLoss, DiscreteIQLLoss):
            raise TypeError(
                f"losses[{number}] is a {type(loss).__name__}; wanted IQLLoss or DiscreteIQLLoss."
            )
        if type(loss) is not type(first):
            raise ValueError(
                f"losses[{number}] is a {type(loss).__name__}, the first another kind."
            )
        for name in (*SAME, "tensor_keys"):
            check_same(number, name, getattr(first, name), getattr(loss, name))
        estimators = first.value_estimator, loss.value_estimator
        if type(estimators[1]) is not TD0Estimator or estimators[1].average_rewards:
            raise ValueError(f"losses[{number}] does not use TD(0); a population does.")
        if estimators[1].gamma.numel() != 1:
            raise ValueError(
                f"losses[{number}] has several discounts; a run of a population has one."
            )
        check_same(number, "value_estimator's keys", *(e.tensor_keys for e in estimators))
        check_networks(number, first, loss, NETWORKS)
    if callable(first.actor_objective):
        raise ValueError("actor_objective is a function, which sees one run; use 'log_prob'.")
    if not is_head_and_distribution(first.actor_network):
        raise ValueError(
            "actor_network must be one module and one distribution, ProbabilisticActor."
        )
    keys = first.tensor_keys.state_action_value, first.tensor_keys.value
    for name, key in zip(NETWORKS[1:], keys, strict=True):
        if not writes(getattr(first, name), key):
            raise ValueError(
                f"{name} must be one plain module whose one out-key is {key!r}, ValueOperator; its "
                f"out_keys are {getattr(first, name).out_keys}."
            )
