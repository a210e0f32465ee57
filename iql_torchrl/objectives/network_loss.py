"""A TorchRL loss that holds an actor, K critics with targets and V: parameters, keys, evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from iql_torchrl.objectives.averages import start_average, tie_average
from iql_torchrl.objectives.conversion import check_form, convert_networks, scalar_mode
from iql_torchrl.objectives.encoding import observed_keys
from iql_torchrl.objectives.ensembles import Critics, SharedLeaves
from iql_torchrl.objectives.evaluator import GENERAL, Evaluator

__all__ = ["NetworkLoss"]

NOT_SAVED = ("map_critics", "_current", "kept_evaluator")


class NetworkLoss(LossModule):
    """Holds actor, critics and V as TorchRL's losses do; abstract."""

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

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    encoder_network: TensorDictModule | None
    encoder_network_params: TensorDictParams
    target_encoder_network_params: TensorDictParams

    shared: SharedLeaves
    optional_keys: set[NestedKey]
    _current: Evaluator | None = None
    kept_evaluator: Evaluator | None = None

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
        actor_ema: float = 0.0,
        encoder_network: TensorDictModule | None = None,
        random_shift: int = 0,
    ) -> None:
        self._in_keys: list[NestedKey] | None = None
        super().__init__()
        self._set_deprecated_ctor_keys(priority=priority_key)
        check_form(num_qvalue_nets, value_network, reduction, gamma)
        self._actor_ema = actor_ema
        self.averaged_actor: Any = None
        self.encoder_network = encoder_network
        self.random_shift = random_shift
        self.num_qvalue_nets = num_qvalue_nets
        self.delay_qvalue = True
        self.deactivate_vmap = deactivate_vmap
        self.reduction = reduction or "mean"
        self.scalar_output_mode = scalar_mode(self, scalar_output_mode, stacklevel=5)
        self.shared = self._convert(actor_network, qvalue_network, value_network, separate_losses)
        self._make_vmap()

    # -- networks ------------------------------------------------------------------------------

    @property
    def actor_ema(self) -> float:
        """Decay of the policy's averaged weights; chosen when the loss is built."""
        return self._actor_ema

    def _convert(
        self, actor: nn.Module, critics: Critics, value: nn.Module, separate_losses: bool
    ) -> SharedLeaves:
        """Register the networks, and return the record of parameters that they share."""
        return convert_networks(self, actor, critics, value, separate_losses=separate_losses)

    def _make_vmap(self) -> None:
        network = self.qvalue_network

        def evaluate(inputs: TensorDictBase, params: TensorDictBase) -> TensorDictBase:
            with params.to_module(network, preserve_module_state=False):
                return network(inputs)

        def one_by_one(inputs: TensorDictBase, params: TensorDictBase) -> TensorDictBase:
            return torch.stack([evaluate(inputs.copy(), critic) for critic in params.unbind(0)])

        self.map_critics: Callable[..., TensorDictBase] = (
            one_by_one
            if self.deactivate_vmap
            else torch.vmap(evaluate, (None, 0), randomness=self.vmap_randomness)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> NetworkLoss:
        super()._apply(fn, *args, **kwargs)
        _move_constants(self.actor_network, fn)
        if self.averaged_actor is not None:
            _move_constants(self.averaged_actor, fn)
            self.averaged_actor._apply(fn)  # tensors that are neither parameters nor buffers
        self.shared.tie(self)
        tie_average(self)
        self.forget_evaluator()
        return self

    @property
    def evaluator(self) -> Evaluator:
        """What evaluates the networks: TorchRL's way, or the one of :meth:`evaluated_by`."""
        return GENERAL if self._current is None else self._current

    @contextmanager
    def evaluated_by(self, make: Callable[[Any, Evaluator], Evaluator]) -> Iterator[None]:
        """Evaluate the networks with ``make(self, general evaluator)`` inside the context.

        The result of ``make`` is kept until the loss is moved, cast, loaded, reset or given other
        keys, or an attribute, a part or the hooks of a network change. An update passes
        ``iql_torchrl.fast_networks.evaluator.FastEvaluator``.
        """
        if self.kept_evaluator is None or self.kept_evaluator.is_outdated():
            self.kept_evaluator = make(self, GENERAL)
        self.kept_evaluator.follow_modes()
        self._current = self.kept_evaluator
        try:
            yield
        finally:
            self._current = None

    def forget_evaluator(self) -> None:
        """Let :meth:`evaluated_by` make an evaluator again, since tensors or keys are others now."""
        self.kept_evaluator = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in NOT_SAVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.shared.tie(self)
        tie_average(self)
        self._make_vmap()

    def reset_parameters_recursive(self) -> None:
        """Initialise every network again, targets too, as TorchRL's losses do."""
        self.shared.untie(self)
        super().reset_parameters_recursive()
        self.shared.tie(self)
        start_average(self)
        self.forget_evaluator()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters to optimise, each once: mirrors of a shared trunk are left out."""
        mirrors = self.shared.mirrors(self) if "shared" in self.__dict__ else set()
        for name, parameter in super().named_parameters(prefix, recurse, **kwargs):
            if id(parameter) not in mirrors:
                yield name, parameter

    # -- keys ----------------------------------------------------------------------------------

    def _set_in_keys(self) -> None:
        keys = self.tensor_keys
        of_value = observed_keys(self, self.value_network.in_keys)
        names = [
            keys.action,
            *(("next", key) for key in (keys.reward, keys.done, keys.terminated)),
            *observed_keys(self, self.actor_network.in_keys),
            *observed_keys(self, self.qvalue_network.in_keys),
            *of_value,
            *(("next", key) for key in of_value),
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
        self.forget_evaluator()

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


def _move_constants(actor: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Move or cast tensors that distributions get as keyword arguments, such as bounds.

    They are no parameters or buffers, and the actor is no submodule of the loss.
    """
    for module in actor.modules():
        keywords = getattr(module, "distribution_kwargs", None)
        if isinstance(keywords, dict):
            moved = {k: fn(v) for k, v in keywords.items() if isinstance(v, Tensor)}
            keywords.update(moved)
