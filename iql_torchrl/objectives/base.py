"""Actor, critics and V as TorchRL keeps them: stacked parameters, targets, keys, estimator."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import TD0Estimator, ValueEstimatorBase

from iql_torchrl import functional as F
from iql_torchrl.fast_networks.detect import BoundNetworks
from iql_torchrl.host import children_of
from iql_torchrl.objectives.batch import Batch, agree, output_of, per_sample, read_batch
from iql_torchrl.objectives.ensembles import (
    Critics,
    SharedLeaves,
    initialise_critics,
    list_critics,
    unlocked,
)

__all__ = ["OfflineLoss"]


class OfflineLoss(LossModule):
    """A TorchRL loss over a policy, K critics with targets, and V; abstract.

    Holds the networks and evaluates each quantity of an update; subclasses say what is done with
    them.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can rename; those of TorchRL's IQLLoss and ``priority_weight``."""

        value: NestedKey = "state_value"
        action: NestedKey = "action"
        log_prob: NestedKey = "_log_prob"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    _bound: BoundNetworks | None = None
    _kept: BoundNetworks | None = None

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: Critics,
        value_network: TensorDictModule,
        *,
        num_qvalue_nets: int,
        separate_losses: bool,
        reduction: str | None,
        deactivate_vmap: bool,
        scalar_output_mode: str | None,
        priority_key: str | None,
        gamma: float | None,
    ) -> None:
        self._in_keys: list[NestedKey] | None = None
        super().__init__()
        self._set_deprecated_ctor_keys(priority=priority_key)
        if gamma is not None:
            raise TypeError(
                f"gamma is {gamma!r}; the discount belongs to the value estimator: call "
                f"loss.make_value_estimator(gamma={gamma!r}) after building the loss."
            )
        if isinstance(num_qvalue_nets, bool) or not isinstance(num_qvalue_nets, int):
            raise TypeError(f"num_qvalue_nets is {num_qvalue_nets!r}; wanted a whole number >= 1.")
        if num_qvalue_nets < 1:
            raise ValueError(f"num_qvalue_nets is {num_qvalue_nets}; wanted at least one critic.")
        if value_network is None:
            raise ValueError(
                "value_network is None: IQL needs a state-value network V(s), for the targets of "
                "the critics and for the policy's advantages. Pass a module that writes "
                "'state_value'."
            )
        self.num_qvalue_nets = num_qvalue_nets
        self.delay_qvalue = True
        self.deactivate_vmap = deactivate_vmap
        self.reduction = reduction or "mean"
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}; choose 'mean', 'sum' or 'none'.")
        self.scalar_output_mode = _scalar_mode(self, scalar_output_mode)
        self._convert(actor_network, qvalue_network, value_network, separate_losses)
        self._make_vmap()

    # -- networks ------------------------------------------------------------------------------

    def _convert(
        self,
        actor: nn.Module,
        critics: Critics,
        value: nn.Module,
        separate_losses: bool,
    ) -> None:
        listed = list_critics(critics, self.num_qvalue_nets)
        modules = listed if isinstance(listed, list) else [listed]
        _check_networks(actor_network=[actor], qvalue_network=modules, value_network=[value])
        shared = SharedLeaves(detach=separate_losses)
        owners: dict[str, nn.Module] = {"actor_network": actor, "value_network": value}
        if separate_losses:
            shared.find_trunk("value_network", [value], {"actor_network": actor})
        if separate_losses or len(modules) > 1:
            shared.find_trunk("qvalue_network", modules, owners)
        self.convert_to_functional(actor, "actor_network")
        self.convert_to_functional(
            value,
            "value_network",
            compare_against=list(actor.parameters()) if separate_losses else None,
        )
        self.convert_to_functional(
            listed,
            "qvalue_network",
            None if self.num_qvalue_nets == 1 else self.num_qvalue_nets,
            create_target_params=True,
            compare_against=(
                [*actor.parameters(), *value.parameters()] if separate_losses else None
            ),
        )
        if self.num_qvalue_nets > 1 and not isinstance(listed, list):
            initialise_critics(
                self.qvalue_network_params,
                children_of(self)["target_qvalue_network_params"],
                listed,
            )
        shared.install(self, "value_network", [value])
        shared.install(self, "qvalue_network", modules)
        self._shared = shared
        self._optional_keys = _recurrent_keys(actor, value, *modules)
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)

    def _make_vmap(self) -> None:
        def evaluate(inputs: TensorDictBase, params: TensorDictBase) -> TensorDictBase:
            with params.to_module(self.qvalue_network, preserve_module_state=False):
                return self.qvalue_network(inputs)

        def one_by_one(inputs: TensorDictBase, params: TensorDictBase) -> TensorDictBase:
            return torch.stack([evaluate(inputs.copy(), critic) for critic in params.unbind(0)])

        self._vmap_qvalue_network: Callable[..., TensorDictBase] = (
            one_by_one
            if self.deactivate_vmap
            else torch.vmap(evaluate, (None, 0), randomness=self.vmap_randomness)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> OfflineLoss:
        super()._apply(fn, *args, **kwargs)
        self._shared.tie(self)
        self._kept = None
        return self

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Evaluate known networks the short way inside (:mod:`iql_torchrl.fast_networks.detect`).

        The values are the same but for rounding; gradients cannot be differentiated again, and
        hooks put on a network afterwards are not seen.
        """
        if self._kept is None:
            self._kept = self._bind()
        self._kept.follow_modes()
        self._bound = self._kept
        try:
            yield
        finally:
            self._bound = None

    def _bind(self) -> BoundNetworks:
        return BoundNetworks(self)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_vmap_qvalue_network", "_bound", "_kept")
        return {k: v for k, v in self.__dict__.items() if k not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shared.tie(self)
        self._make_vmap()

    def reset_parameters_recursive(self) -> None:
        """Draw every network anew, targets too, as TorchRL's losses do."""
        self._shared.untie(self)
        super().reset_parameters_recursive()
        self._shared.tie(self)
        self._kept = None

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters to optimise, each once: mirrors of a shared trunk are left out."""
        mirrors = self._shared.mirrors(self) if "_shared" in self.__dict__ else set()
        for name, parameter in super().named_parameters(prefix, recurse, **kwargs):
            if id(parameter) not in mirrors:
                yield name, parameter

    # -- keys ----------------------------------------------------------------------------------

    def _set_in_keys(self) -> None:
        keys = self.tensor_keys
        names = [
            keys.action,
            *(("next", key) for key in (keys.reward, keys.done, keys.terminated)),
            *self.actor_network.in_keys,
            *self.qvalue_network.in_keys,
            *self.value_network.in_keys,
            *(("next", key) for key in self.value_network.in_keys),
        ]
        self._in_keys = list(dict.fromkeys(unravel_key(name) for name in names))

    def set_keys(self, **kwargs: Any) -> None:
        """Rename entries of the batch, as TorchRL's losses do; ``ValueError`` on an unknown name."""
        known = [field.name for field in fields(self._AcceptedKeys)]
        if unknown := [name for name in kwargs if name not in known]:
            raise ValueError(
                f"{unknown[0]} is not an accepted tensordict key of {type(self).__name__}; choose "
                f"from {', '.join(known)}."
            )
        super().set_keys(**kwargs)
        self._kept = None  # short ways know where outputs go

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys that :meth:`forward` reads; ``("next", ...)`` ones only for V."""
        if self._in_keys is None:
            self._set_in_keys()
        assert self._in_keys is not None
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def make_value_estimator(
        self, value_type: ValueEstimators | ValueEstimatorBase | None = None, **hyperparams: Any
    ) -> OfflineLoss:
        """Choose how the critics' targets are made: TD(0) (default), TD(1), TD(lambda), or your own.

        ``loss.make_value_estimator(gamma=0.97)`` sets the discount (TorchRL's default is 0.99).
        Raises ``NotImplementedError`` on an estimator that needs an on-policy log, ``TypeError`` on
        another kind of ``value_type``, ``ValueError`` on a number ``gamma`` outside [0, 1].
        """
        gamma = hyperparams.get("gamma")
        if isinstance(gamma, str) or (isinstance(gamma, Real) and not 0 <= float(gamma) <= 1):
            raise ValueError(f"gamma is {gamma!r}; a discount per step lies in [0, 1].")
        value_type = value_type or self.default_value_estimator
        if isinstance(value_type, ValueEstimatorBase | type):
            return super().make_value_estimator(value_type, **hyperparams)
        if not isinstance(value_type, ValueEstimators):
            raise TypeError(
                f"value_type is {value_type!r}; wanted one of torchrl.objectives.ValueEstimators, "
                "such as ValueEstimators.TD0, or a value estimator."
            )
        keys = self.tensor_keys
        dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys={
                "value_target": "value_target",
                "value": keys.value,
                "reward": keys.reward,
                "done": keys.done,
                "terminated": keys.terminated,
            },
            **hyperparams,
        )
        return self

    # -- quantities, each evaluated once an update ----------------------------------------------

    def read(self, tensordict: TensorDictBase) -> Batch:
        """The batch as the update reads it: see :func:`iql_torchrl.objectives.batch.read_batch`."""
        weigh = self.use_prioritized_weights in (True, "auto")
        done = unravel_key(("next", self.tensor_keys.done))
        return read_batch(
            tensordict,
            required=[key for key in self.in_keys if key not in self._optional_keys | {done}],
            mask_keys=self._loss_mask_keys(),
            weight_key=self.tensor_keys.priority_weight if weigh else None,
            done_key=done,
        )

    def target_qvalue(self, batch: Batch) -> Tensor:
        """Minimum over the target critics of ``Q(s, a)``, shape ``(*B,)``, without gradient."""
        params = children_of(self)["target_qvalue_network_params"]
        with torch.no_grad():
            if self._bound is None or id(params) not in self._bound.critics:
                params = self._shared.with_spare_buffers("qvalue_network", params)
            return self.action_values(batch, params).amin(0)

    def qvalue(self, batch: Batch) -> Tensor:
        """``Q_k(s, a)`` of every critic, shape ``(K, *B)``, with gradient."""
        return self.action_values(batch, self._shared.live(self, "qvalue_network"))

    def state_value(self, batch: Batch) -> Tensor:
        """``V(s)``, shape ``(*B,)``, with gradient."""
        key = self.tensor_keys.value
        if self._bound is not None and self._bound.value is not None:
            return per_sample(self._bound.value(batch.data), batch.data.batch_size, key)
        params = self._shared.live(self, "value_network")
        inputs = batch.data.select(*self.value_network.in_keys, strict=False)
        with params.to_module(self.value_network, preserve_module_state=False):
            value = output_of(self.value_network(inputs), key, "value_network")
        return per_sample(value, inputs.batch_size, key)

    def state_values(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """``V(s)`` and, where one evaluation gives both, ``V(s')``; without gradient."""
        with torch.no_grad():
            value = None if self._bound is None else self._bound.value
            if value is None or not value.by_row or not self._bootstraps_once():
                return self.state_value(batch), None
            key, shape = self.tensor_keys.value, batch.data.batch_size
            here, there = value.twice(batch.data, batch.next.data)
            return per_sample(here, shape, key), per_sample(there, shape, key)

    def _bootstraps_once(self) -> bool:
        """Whether targets take ``V(s')`` of the batch and nothing else from V."""
        estimator = self.value_estimator
        return type(estimator) is TD0Estimator and not estimator.average_rewards

    def td_target(self, batch: Batch, next_value: Tensor | None = None) -> Tensor:
        """Regression target of the critics, shape ``(*B,)``, without gradient.

        ``r + gamma V(s')``, bootstrapped past truncation and not past termination; with
        ``steps_to_next_obs`` in the batch (n-step rewards) the discount is ``gamma**n``.
        ``next_value``, ``V(s')``, is evaluated where it is not given.
        """
        estimator, data = self.value_estimator, batch.data
        shape = data.batch_size
        with torch.no_grad():
            if not self._bootstraps_once():
                target = estimator.value_estimate(
                    data.copy(), target_params=self.target_value_network_params
                )
                return per_sample(target, shape, "value_target")
            keys = estimator.tensor_keys
            reward, terminated = (
                per_sample(data.get(("next", key)), shape, ("next", key))
                for key in (keys.reward, keys.terminated)
            )
            gamma = estimator.gamma.to(reward.device)
            if gamma.ndim:
                gamma = per_sample(gamma, shape, "gamma")
            steps = data.get(keys.steps_to_next_obs, None)
            if steps is not None:
                gamma = gamma ** per_sample(steps, shape, keys.steps_to_next_obs)
            if next_value is None:
                next_value = self.state_value(batch.next)
            agree(reward=reward, terminated=terminated, next_state_value=next_value)
            return F.td_target(reward, next_value, terminated, gamma=gamma)

    def critic_outputs(self, batch: Batch, params: TensorDictBase) -> Tensor:
        """Raw outputs of K critics with stacked ``params``, shape ``(K, *B, n)``."""
        if self._bound is not None and id(params) in self._bound.critics:
            return self._bound.critics[id(params)](batch.data)
        inputs = batch.data.select(*self.qvalue_network.in_keys, strict=False)
        key = self.tensor_keys.state_action_value
        if self.num_qvalue_nets > 1:
            if torch.compiler.is_compiling():  # vmap would lock anew, which warns in a graph
                params = unlocked(params)
            return output_of(self._vmap_qvalue_network(inputs, params), key, "qvalue_network")
        with params.to_module(self.qvalue_network, preserve_module_state=False):
            return output_of(self.qvalue_network(inputs), key, "qvalue_network").unsqueeze(0)

    @contextmanager
    def _live_actor(self) -> Iterator[Any]:
        """The actor with its parameters in it."""
        if self._bound is not None and self._bound.actor is not None:
            yield self._bound.actor
        else:
            params = self.actor_network_params
            with params.to_module(self.actor_network, preserve_module_state=False):
                yield self.actor_network

    @abstractmethod
    def action_values(self, batch: Batch, params: TensorDictBase) -> Tensor:
        """``Q_k(s, a)`` of the logged action from K critics with stacked ``params``, ``(K, *B)``."""

    def _reduce(self, loss: Tensor, batch: Batch) -> Tensor:
        """Reduce per-sample losses; a mask or weight of a step counts for all that it holds."""
        return F.reduce(
            loss,
            reduction=self.reduction,
            mask=batch.mask_like(loss),
            weight=batch.weight_like(loss),
            dim=self._samples(loss),
        )

    def _samples(self, value: Tensor) -> Sequence[int] | None:
        """Dimensions of per-sample ``value`` that one run's mean goes over; None for all."""
        return None


def _check_networks(**networks: list[Any]) -> None:
    for name, modules in networks.items():
        for module in modules:
            if not isinstance(module, nn.Module) or not hasattr(module, "in_keys"):
                raise TypeError(
                    f"{name} is {type(module).__name__}; wanted a TensorDictModule: wrap a plain "
                    "network as TensorDictModule(network, in_keys=[...], out_keys=[...])."
                )


def _recurrent_keys(*networks: nn.Module) -> set[NestedKey]:
    """Keys that recurrent modules start from when a batch holds them and do without otherwise."""
    cells = [m for net in networks for m in net.modules() if isinstance(m, LSTMModule | GRUModule)]
    states = {unravel_key(key) for cell in cells for key in cell.in_keys[1:] if key != "is_init"}
    return states | {unravel_key(("next", key)) for key in states}


def _before_load(loss: OfflineLoss, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    loss._shared.untie(loss)
    if loss.num_qvalue_nets == 1:
        _squeeze_lone_critic(loss, state_dict, prefix)


def _scalar_mode(loss: OfflineLoss, mode: str | None) -> str | None:
    if mode not in (None, "exclude", "non_tensor"):
        raise ValueError(f"scalar_output_mode is {mode!r}; choose 'exclude', 'non_tensor' or None.")
    if loss.reduction != "none" or mode is not None:
        return mode
    warnings.warn(
        f"{type(loss).__name__} with reduction='none' returns losses of the batch's shape, beside "
        "which a scalar (entropy, diagnostics) has no place: they are left out. Pass "
        "scalar_output_mode='exclude' to say so, or 'non_tensor' to keep them as non-tensor data.",
        UserWarning,
        stacklevel=5,
    )
    return "exclude"


def _after_load(loss: OfflineLoss, _: Any) -> None:
    loss._shared.tie(loss)
    loss._kept = None


def _squeeze_lone_critic(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Accept checkpoints of older TorchRL losses, where a single critic had a leading dimension."""
    for key, current in module.state_dict().items():
        stored = state_dict.get(prefix + key)
        is_critic = key.removeprefix("target_").startswith("qvalue_network_params.")
        if is_critic and stored is not None and stored.shape == (1, *current.shape):
            state_dict[prefix + key] = stored.squeeze(0)
