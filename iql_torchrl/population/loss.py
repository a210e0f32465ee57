"""The losses of P runs as one loss over stacked parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, distributions, nn

from iql_torchrl.fast_networks.evaluator import DirectActor, Watched, detach_all
from iql_torchrl.fast_networks.stacked import (
    StackedNetwork,
    perceptron_keys,
)
from iql_torchrl.host import DETACHED_CRITICS, LIVE_CRITICS, TARGET_CRITICS, children_of
from iql_torchrl.objectives.batch import Batch
from iql_torchrl.objectives.conversion import NETWORKS
from iql_torchrl.objectives.discrete import DiscreteIQLLoss
from iql_torchrl.objectives.draws import Draw
from iql_torchrl.objectives.encoding import ENCODER, add_encoder
from iql_torchrl.objectives.ensembles import SharedLeaves
from iql_torchrl.objectives.evaluator import GENERAL, Evaluator
from iql_torchrl.objectives.implicit import ImplicitQLoss
from iql_torchrl.objectives.iql import IQLLoss
from iql_torchrl.objectives.policy_objectives import policy_action
from iql_torchrl.policies import FlowPolicy
from iql_torchrl.population.alike import check_alike, per_run_names, shared_names

__all__ = ["PopulationLoss"]

PARAMETERS = frozenset(inspect.signature(ImplicitQLoss.__init__).parameters)


class PopulationLoss(ImplicitQLoss):
    """P losses over stacked parameters: every loss and scalar has shape ``(P,)``.

    Batches are ``(B,)``, the same for every run, or ``(P, B)``, one for each. The random tensors of
    :meth:`random_inputs` are drawn for each run, all from one generator, so a run gets other numbers
    than if it were trained alone. The discount and the knobs with ``per_run`` (``expectile``,
    ``temperature``, ...) differ between runs; they are buffers ``(P, 1)``. No parameter is shared, so
    the sum of the P losses trains each run as if it were alone.

    Args:
        losses: one :class:`IQLLoss` or :class:`DiscreteIQLLoss` per run, equal in everything except
            knobs and weights; copied.

    Raises:
        ValueError: losses that differ in kind, networks, keys or choices; networks that share
            parameters or cannot be stacked (``fast_networks.stacked.perceptron_keys``);
            estimators other than TD(0).
        TypeError: losses of another kind, classes derived from the two included.
    """

    discount: Tensor
    among: tuple[int, int] | None = None  # (first, count) where this is a part of a population

    def __init__(self, losses: Sequence[ImplicitQLoss]) -> None:
        if not losses:
            raise ValueError("losses is empty; a population has at least one run.")
        check_alike(losses)
        first = losses[0]
        self.members = len(losses)
        self._kind = DiscreteIQLLoss if isinstance(first, DiscreteIQLLoss) else IQLLoss
        self._losses: Sequence[ImplicitQLoss] = losses  # only while they are stacked
        shared = shared_names(first)
        first_run: dict[str, Any] = {n: getattr(first, n) for n in shared if n in PARAMETERS}
        first_run |= {name: float(getattr(first, name)) for name in per_run_names(first)}
        super().__init__(
            first.actor_network,
            first.qvalue_network,
            first.value_network,
            encoder_network=copy.deepcopy(first.encoder_network),
            **first_run,
        )
        del self._losses
        for name in shared:
            if name not in PARAMETERS:
                setattr(self, name, getattr(first, name))
        self.out_keys = list(first.out_keys)
        self._tensor_keys = copy.copy(first.tensor_keys)
        like = next(first.parameters())
        for name in per_run_names(first):
            delattr(self, name)  # the first run's number; the buffer has the numbers of all runs
            values = torch.tensor([float(getattr(x, name)) for x in losses], dtype=torch.float64)
            self.register_buffer(name, values.to(like).unsqueeze(-1), persistent=False)
        discount = torch.stack([loss.value_estimator.gamma.reshape(()) for loss in losses])
        discount = discount.to(like.device).unsqueeze(-1)
        self.register_buffer("discount", discount, persistent=False)
        self.make_value_estimator(gamma=float(discount[0]))
        self.value_estimator.set_keys(**vars(first.value_estimator.tensor_keys))

    def _convert(
        self, actor: nn.Module, critics: Any, value: nn.Module, separate_losses: bool
    ) -> SharedLeaves:
        """Stack the parameters of the losses, which TorchRL has converted already."""
        first = self._losses[0]
        for name, network in zip(NETWORKS, (actor, critics, value), strict=True):
            self.__dict__[name] = copy.deepcopy(network)  # not a submodule, as in LossModule
            inside = perceptron_keys(name, network)
            self._has_update_associated[name] = False
            for attribute in (f"{name}_params", f"target_{name}_params", f"average_{name}_params"):
                if attribute in children_of(first):
                    setattr(self, attribute, self._stacked(attribute, network, inside))
        if self.encoder_network is not None:
            first.encoder_network_params.data.clone().to_module(self.encoder_network)
        add_encoder(self)
        self.optional_keys = set(first.optional_keys)
        self.register_load_state_dict_post_hook(_forget_evaluator)
        return SharedLeaves(detach=False)

    def _stacked(self, attribute: str, network: Any, inside: set[NestedKey]) -> TensorDictParams:
        """The losses' parameters ``attribute``, ``(P, ...)`` in each entry.

        Entries outside of perceptrons get a dimension of size 1 for the batch, ``(P, 1, ...)``.
        """
        stacks: list[Any] = [children_of(loss)[attribute] for loss in self._losses]
        stacked: Any = torch.stack([params.data for params in stacks]).contiguous()
        is_live = not attribute.startswith(("target_", "average_"))
        for key in list(stacked.keys(True, True)):
            leaf = stacked.get(key)
            if key not in inside and not _is_buffer(network, key):
                leaf = leaf.unsqueeze(1)
            trained = is_live and stacks[0].get(key).requires_grad
            stacked.set(key, nn.Parameter(leaf) if trained else leaf)
        return TensorDictParams(stacked, no_convert=True)

    def write_member(self, number: int, loss: ImplicitQLoss) -> None:
        """Copy run ``number``'s weights, targets too, into an ordinary loss of the same shapes."""
        with torch.no_grad():
            for name, stacked in children_of(self).items():
                of_encoder = name.removeprefix("target_").startswith(ENCODER)
                if isinstance(stacked, TensorDictParams) and not of_encoder:
                    for key, leaf in children_of(loss)[name].items(True, True):
                        leaf.data.copy_(stacked.get(key)[number].reshape(leaf.shape))

    # -- networks --------------------------------------------------------------------------------

    @property
    def evaluator(self) -> Evaluator:
        """:class:`StackedEvaluator`: no other evaluator can use a population's parameters."""
        if self._current is not None:
            return self._current
        if self.kept_evaluator is None or self.kept_evaluator.is_outdated():
            self.kept_evaluator = StackedEvaluator(self)
        self.kept_evaluator.follow_modes()
        return self.kept_evaluator

    def evaluated_by(self, make: Any) -> Any:
        """:class:`StackedEvaluator` inside the context too, whatever ``make`` is."""
        return super().evaluated_by(StackedEvaluator)

    def reset_parameters_recursive(self) -> None:
        raise NotImplementedError(
            "a population's weights are drawn run by run: reset the losses it is made from, and "
            "build it again."
        )

    def read(self, tensordict: TensorDictBase, draws: Mapping[str, Tensor] | None = None) -> Batch:
        batch = super().read(tensordict, draws)
        shape = batch.data.batch_size
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != self.members):
            raise ValueError(
                f"the batch has shape {tuple(shape)}; expected (B,) for all {self.members} runs or "
                f"({self.members}, B)."
            )
        if len(shape) == 2:
            return batch
        mask, weight = (
            None if entry is None else entry.expand(self.members, *shape)
            for entry in (batch.mask, batch.weight)
        )
        return replace(batch, mask=mask, weight=weight)

    def sample_shape(self, batch_size: torch.Size) -> tuple[int, ...]:
        return tuple(batch_size) if len(batch_size) == 2 else (self.members, *batch_size)

    def random_inputs(self, batch_size: torch.Size) -> Mapping[str, Draw]:
        needed = super().random_inputs(batch_size)
        return {key: replace(draw, among=self.among) for key, draw in needed.items()}

    def run_dims(self, batch: Batch) -> int:
        return 2 - batch.data.ndim

    def action_values(self, batch: Batch, name: str) -> Tensor:
        """``(K, P, B)``."""
        return self._kind.action_values(self, batch, name)

    def _of_step(self, batch: Batch, key: NestedKey) -> Tensor:
        value = super()._of_step(batch, key)
        return value if batch.data.ndim == 2 else value.expand(self.members, *value.shape)

    def _discount(self, batch: Batch) -> Tensor:
        return self.discount

    def each_run(self, batch: Batch) -> Batch:
        if batch.data.ndim == 2:
            return batch
        data = batch.data.expand(self.members, *batch.data.batch_size)
        return Batch(data, batch.mask, batch.weight)

    def policy_output(self, batch: Batch) -> tuple[Tensor, distributions.Distribution | None]:
        with self.evaluator.policy(self) as actor:
            dist = actor.get_dist(self.inputs(batch))
        return policy_action(dist), dist

    def _actor_error(self, batch: Batch) -> Tensor:
        action = self.logged(batch)
        with self.evaluator.policy(self) as actor:
            dist = actor.get_dist(self.inputs(batch))
        if self.actor_objective == "mse":
            distance: Tensor = (dist.deterministic_sample - action).square().sum(-1)
            return distance
        data = TensorDict({self.tensor_keys.action: action})
        logged = self._kind.logged_action(self, Batch(data, None, None), dist)
        error: Tensor = -dist.log_prob(logged)
        return error

    def logged(self, batch: Batch) -> Tensor:
        action = batch.data.get(self.tensor_keys.action)
        return action if batch.data.ndim == 2 else action.expand(self.members, *action.shape)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`actor_term` of a batch, to which nothing is written."""
        batch = self.read(tensordict)
        with torch.no_grad():
            advantage = self.target_qvalue(batch) - self.state_value(batch)
        return self.actor_term(batch, advantage)

    # -- one mean per run ------------------------------------------------------------------------

    def _samples(self, value: Tensor) -> Sequence[int]:
        return tuple(range(1, value.ndim))

    def outputs(
        self, tensordict: TensorDictBase, losses: dict[str, Tensor], summary: dict[str, Tensor]
    ) -> TensorDictBase:
        """Losses and scalars, each ``(P,)``; the batch, which many runs read, is not written to."""
        scalars = {k: v for k, v in summary.items() if k not in ("priority", "log_prob")}
        return TensorDict(losses | scalars, batch_size=[self.members])


class StackedEvaluator:
    """Evaluates a population's networks over its stacked parameters; outputs are per run."""

    def __init__(self, loss: Any, general: object = None) -> None:
        params = children_of(loss)
        self._value = StackedNetwork(
            "value_network", loss.value_network, params["value_network_params"]
        )
        self._critics = {
            name: StackedNetwork("qvalue_network", loss.qvalue_network, params[name])
            for name in (LIVE_CRITICS, TARGET_CRITICS)
        }
        self._critics[DETACHED_CRITICS] = StackedNetwork(
            "qvalue_network", loss.qvalue_network, params[LIVE_CRITICS]
        )
        detach_all(self._critics[DETACHED_CRITICS].module)  # a stacked critic is perceptrons alone
        policy = StackedNetwork("actor_network", loss.actor_network, params["actor_network_params"])
        flow = isinstance(policy.module, FlowPolicy)
        self._actor: Any = policy.module if flow else DirectActor(policy.module)
        self._all = [self._value, *self._critics.values(), policy]
        self._watched = Watched(loss.actor_network, loss.qvalue_network, loss.value_network)

    def is_outdated(self) -> bool:
        """Whether an attribute, a part or the hooks of a network have changed."""
        return self._watched.changed()

    def follow_modes(self) -> None:
        """Set training or evaluation mode as the population's networks have it."""
        for network in self._all:
            network.follow_modes()

    def state_value(self, loss: Any, data: TensorDictBase) -> Tensor:
        """``(P, B, 1)``."""
        return self._value(data)

    def state_values(self, loss: Any, first: TensorDictBase, second: TensorDictBase) -> None:
        """Two batches are evaluated one after the other."""
        return

    def critic_outputs(self, loss: Any, data: TensorDictBase, name: str) -> Tensor:
        """``(K, P, B, n)``."""
        out = self._critics[name](data)
        return out.unsqueeze(0) if loss.num_qvalue_nets == 1 else out.transpose(0, 1)

    def features(self, loss: Any, data: TensorDictBase, target: bool) -> TensorDictBase:
        """Without the dimension of runs where these share the batch: they share the encoder too."""
        return GENERAL.features(loss, data, target)

    @contextmanager
    def policy(self, loss: Any) -> Iterator[Any]:
        yield self._actor


def _is_buffer(network: nn.Module, key: NestedKey) -> bool:
    name = key if isinstance(key, str) else ".".join(key)
    return name in {name for name, _ in network.named_buffers()}


def _forget_evaluator(loss: PopulationLoss, _: Any) -> None:
    loss.forget_evaluator()
