"""The losses of P runs as one loss over stacked parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, distributions, nn

from iql_torchrl.losses import DiscreteIQLLoss, ImplicitQLoss, IQLLoss
from iql_torchrl.losses.batch import Batch, Draw
from iql_torchrl.losses.parameters import ENCODER, NETWORKS
from iql_torchrl.networks import AroundPerceptron
from iql_torchrl.networks.direct import Direct, DirectNetworks, leaves_of
from iql_torchrl.networks.evaluation import Perceptron, StackedPerceptron, is_stackable
from iql_torchrl.policies import FlowPolicy
from iql_torchrl.population.alike import check_alike, per_run_names, perceptron_keys, shared_names
from iql_torchrl.private_apis import DETACHED_CRITICS, LIVE_CRITICS, TARGET_CRITICS, children_of

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
            parameters or cannot be stacked (``population.alike.perceptron_keys``);
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

    def _convert(self, actor: nn.Module, critics: Any, value: nn.Module) -> None:
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
        self._add_encoder()
        self.optional_keys = set(first.optional_keys)

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

    def _hold(self) -> None:
        self.forget_networks()

    @property
    def direct(self) -> DirectNetworks:  # type: ignore[override]
        """How networks are evaluated over stacked parameters, inside and outside of updates."""
        if self.kept_networks is None or self.kept_networks.watched.changed():
            self.kept_networks = self._make_direct()
        return self.kept_networks

    @direct.setter
    def direct(self, _: object) -> None:
        """Nothing to set: there is no other way to evaluate them."""

    def _make_direct(self) -> DirectNetworks:
        actor, params = self.actor_network, children_of(self)
        for name in NETWORKS:
            _hold_shared(name, getattr(self, name), params[f"{name}_params"])

        def over(name: str, network: Any, path: tuple[str, ...], **options: bool) -> Direct:
            return _stacked_network(network, params[name].get(path), **options)

        critics = {
            name: over(
                params_name, self.qvalue_network, ("module",), detached=name == DETACHED_CRITICS
            )
            for name, params_name in (
                (LIVE_CRITICS, LIVE_CRITICS),
                (TARGET_CRITICS, TARGET_CRITICS),
                (DETACHED_CRITICS, LIVE_CRITICS),
            )
        }
        value = over("value_network_params", self.value_network, ("module",))
        of_head = ("head",) if type(actor) is FlowPolicy else ("module", "0", "module")
        head = over("actor_network_params", actor if len(of_head) == 1 else actor[0], of_head)
        return DirectNetworks([getattr(self, name) for name in NETWORKS], value, critics, head)

    def reset_parameters_recursive(self) -> None:
        raise NotImplementedError(
            "a population's weights are drawn run by run: reset the losses it is made from, and "
            "build it again."
        )

    def each_run(self, batch: Batch) -> Batch:
        shape = batch.data.batch_size
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != self.members):
            raise ValueError(
                f"the batch has shape {tuple(shape)}; expected (B,) for all {self.members} runs or "
                f"({self.members}, B)."
            )
        if len(shape) == 2:
            return batch
        runs = (self.members, *shape)
        mask, weight = (
            None if entry is None else entry.expand(runs) for entry in (batch.mask, batch.weight)
        )
        return replace(
            batch, data=batch.data.expand(runs), mask=mask, weight=weight, shared=batch.data
        )

    def random_inputs(self, batch_size: torch.Size) -> Mapping[str, Draw]:
        runs = batch_size if len(batch_size) == 2 else torch.Size((self.members, *batch_size))
        needed = super().random_inputs(runs)
        return {key: replace(draw, among=self.among) for key, draw in needed.items()}

    def critic_outputs(self, data: TensorDictBase, name: str) -> Tensor:
        """``(K, P, B, n)``."""
        out: Tensor = self.direct.critics[name](data)
        return out.unsqueeze(0) if self.num_qvalue_nets == 1 else out.transpose(0, 1)

    def pick(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._kind.pick(self, outputs, batch)

    def logged_action(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        return self._kind.logged_action(self, batch, dist)

    def _discount(self, batch: Batch) -> Tensor:
        return self.discount

    def _policy_action(self, batch: Batch) -> Tensor:
        action: Tensor = self.policy_distribution(self.inputs(batch)).deterministic_sample
        return action

    def outputs(
        self, tensordict: TensorDictBase, losses: dict[str, Tensor], summary: dict[str, Tensor]
    ) -> TensorDictBase:
        """Losses and scalars, each ``(P,)``; the batch, which many runs read, is not written to."""
        scalars = {k: v for k, v in summary.items() if k not in ("priority", "log_prob")}
        return TensorDict(losses | scalars, batch_size=[self.members])


def _hold_shared(name: str, network: nn.Module, params: TensorDictBase) -> None:
    """Put the runs' parameters outside of perceptrons into ``network``, and what they share.

    Raises ``ValueError`` where statistics or bounds differ between the runs.
    """
    for path, module in network.named_modules():
        place = tuple(filter(None, path.split(".")))
        for key, _ in list(module.named_buffers(recurse=False)):
            stacked = params.get((*place, key)).flatten(0, params.batch_dims - 1)
            if not bool((stacked == stacked[:1]).all()):
                raise ValueError(
                    f"{name}'s {path}.{key} differs between the runs; a population shares the "
                    "data, so statistics and bounds must be the same."
                )
            setattr(module, key, stacked[0])
        if type(module) not in (nn.Linear, nn.LayerNorm):
            for key, _ in list(module.named_parameters(recurse=False)):
                leaf = params.get((*place, key))
                trained = isinstance(leaf, nn.Parameter)
                setattr(module, key, leaf if trained else nn.Parameter(leaf, requires_grad=False))


def _stacked_network(network: Any, params: TensorDictBase, *, detached: bool = False) -> Direct:
    """A plain network, or the head of a flow, over stacked parameters of its module."""
    module = network.head if isinstance(network, FlowPolicy) else network.module
    body = module.mlp if isinstance(module, AroundPerceptron) else module
    for path, part in module.named_modules():
        if part is not body and (is_stackable(part) or isinstance(part, StackedPerceptron)):
            part.__class__ = StackedPerceptron
            leaves = leaves_of(part, params.get(tuple(path.split("."))))
            part.over = Perceptron(part, leaves, per_run=True)
    perceptron = None
    if is_stackable(body):
        of_body = params if body is module else params.get("mlp")
        perceptron = Perceptron(body, leaves_of(body, of_body), per_run=True, detached=detached)
    return Direct(module, network.in_keys, perceptron)


def _is_buffer(network: nn.Module, key: NestedKey) -> bool:
    name = key if isinstance(key, str) else ".".join(key)
    return name in {name for name, _ in network.named_buffers()}
