"""Each quantity of an update of actor, critics and V, evaluated once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import TD0Estimator, ValueEstimatorBase

from iql_torchrl import functional as F
from iql_torchrl.host import LIVE_CRITICS, TARGET_CRITICS
from iql_torchrl.objectives.batch import Batch, agree, per_sample, read_batch
from iql_torchrl.objectives.encoding import inputs_of
from iql_torchrl.objectives.network_loss import NetworkLoss

__all__ = ["OfflineLoss"]


class OfflineLoss(NetworkLoss):
    """A TorchRL loss over a policy, K critics with targets, and V; abstract.

    Evaluates each quantity of an update; subclasses define the losses.
    """

    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )

    def make_value_estimator(
        self, value_type: ValueEstimators | ValueEstimatorBase | None = None, **hyperparams: Any
    ) -> OfflineLoss:
        """Choose how the critics' targets are made: TD(0) (default), TD(1), TD(lambda), or your own.

        ``loss.make_value_estimator(gamma=0.97)`` sets the discount (TorchRL's default is 0.99). Its
        numbers become tensors on the device of the loss's parameters, unless ``device`` is given,
        and move with ``loss.to(device)``.
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
                f"value_type is {value_type!r}; pass one of torchrl.objectives.ValueEstimators, "
                "such as ValueEstimators.TD0, or a value estimator."
            )
        if hyperparams.get("device") is None:
            hyperparams["device"] = next(self.parameters()).device
        keys = self.tensor_keys
        names = ("value", "reward", "done", "terminated")
        dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys={"value_target": "value_target"} | {n: getattr(keys, n) for n in names},
            **hyperparams,
        )
        return self

    def read(self, tensordict: TensorDictBase) -> Batch:
        """The batch as the update reads it: see :func:`iql_torchrl.objectives.batch.read_batch`."""
        weigh = self.use_prioritized_weights in (True, "auto")
        done = unravel_key(("next", self.tensor_keys.done))
        return read_batch(
            tensordict,
            required=[key for key in self.in_keys if key not in self.optional_keys | {done}],
            mask_keys=self._loss_mask_keys(),
            weight_key=self.tensor_keys.priority_weight if weigh else None,
            done_key=done,
        )

    def run_dims(self, batch: Batch) -> int:
        """Number of dimensions that outputs have before the batch's: 1 for runs of a population."""
        return 0

    def sample_shape(self, batch_size: torch.Size) -> tuple[int, ...]:
        """Shape of per-sample results: the batch's, or ``(P, B)`` for P runs."""
        return tuple(batch_size)

    def each_run(self, batch: Batch) -> Batch:
        """The batch in the shape of per-sample results, ``(P, B)`` for P runs; else itself."""
        return batch

    def inputs(self, batch: Batch, critics: str | None = None) -> TensorDictBase:
        """What networks read: :func:`iql_torchrl.objectives.encoding.inputs_of`."""
        return inputs_of(self, batch, critics)

    def target_qvalue(self, batch: Batch) -> Tensor:
        """Minimum over the target critics of ``Q(s, a)``, shape ``(*B,)``, without gradient."""
        with torch.no_grad():
            return self.action_values(batch, TARGET_CRITICS).amin(0)

    def qvalue(self, batch: Batch) -> Tensor:
        """``Q_k(s, a)`` of every critic, shape ``(K, *B)``, with gradient."""
        return self.action_values(batch, LIVE_CRITICS)

    @abstractmethod
    def action_values(self, batch: Batch, name: str) -> Tensor:
        """``Q_k(s, a)`` of the logged action from K critics with parameters ``name``, ``(K, *B)``."""

    def state_value(self, batch: Batch) -> Tensor:
        """``V(s)``, shape ``(*B,)``, with gradient."""
        return self._as_values(self.evaluator.state_value(self, self.inputs(batch)), batch)

    def state_values(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """``V(s)`` and, where one evaluation gives both, ``V(s')``; without gradient."""
        with torch.no_grad():
            if self._bootstraps_once():
                both = self.inputs(batch), self.inputs(batch.next)
                pair = self.evaluator.state_values(self, *both)
                if pair is not None:
                    here, there = pair
                    return self._as_values(here, batch), self._as_values(there, batch)
            return self.state_value(batch), None

    def _as_values(self, output: Tensor, batch: Batch) -> Tensor:
        key, shape = self.tensor_keys.value, batch.data.batch_size
        return per_sample(output, shape, key, leading=self.run_dims(batch))

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
        estimator = self.value_estimator
        with torch.no_grad():
            if not self._bootstraps_once():
                data = self.inputs(batch).copy().set("next", self.inputs(batch.next))
                target = estimator.value_estimate(
                    data, target_params=self.target_value_network_params
                )
                return per_sample(target, batch.data.batch_size, "value_target")
            keys = estimator.tensor_keys
            reward, terminated = (
                self._of_step(batch, ("next", key)) for key in (keys.reward, keys.terminated)
            )
            gamma = self._discount(batch)
            if batch.data.get(keys.steps_to_next_obs, None) is not None:
                gamma = gamma ** self._of_step(batch, keys.steps_to_next_obs)
            if next_value is None:
                next_value = self.state_value(batch.next)
            agree(reward=reward, terminated=terminated, next_state_value=next_value)
            return F.td_target(reward, next_value, terminated, gamma=gamma)

    def _of_step(self, batch: Batch, key: NestedKey) -> Tensor:
        """The entry ``key`` with one number per sample, in the shape of :meth:`state_value`."""
        return per_sample(batch.data.get(key), batch.data.batch_size, key)

    def _discount(self, batch: Batch) -> Tensor:
        """The discount, one number or one per sample."""
        gamma: Tensor = self.value_estimator.gamma
        return per_sample(gamma, batch.data.batch_size, "gamma") if gamma.ndim else gamma

    def _reduce(self, loss: Tensor, batch: Batch) -> Tensor:
        """Reduce per-sample losses; a mask or weight of a step applies to all that it holds."""
        return F.reduce(
            loss,
            reduction=self.reduction,
            mask=batch.mask_like(loss),
            weight=batch.weight_like(loss),
            dim=self._samples(loss),
        )

    def divisors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What means over a batch are divided by, ``()`` or ``(P,)`` for P runs, in float64.

        The first is that of losses, the sum of the valid steps' weights; the second that of scalars,
        the number of valid steps.
        """
        shape = self.sample_shape(batch.data.batch_size)
        # not self.parameters(), which torch 2.11 cannot trace, nor next(iter(...)), as torch 2.15
        like, *_ = self.actor_network_params.values(True, True)
        steps = torch.ones(shape, dtype=torch.float64, device=like.device)
        if batch.mask is not None:
            steps = steps.masked_fill(~batch.mask, 0.0)
        weights = steps if batch.weight is None else steps * batch.weight
        dim = self._samples(steps)
        dims = tuple(range(steps.ndim)) if dim is None else tuple(dim)
        return weights.sum(dims), steps.sum(dims)

    def _samples(self, value: Tensor) -> Sequence[int] | None:
        """Dimensions of per-sample ``value`` that the mean of one run goes over; None for all."""
        return None
