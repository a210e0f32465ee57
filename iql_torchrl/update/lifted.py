"""The terms of a loss for P members of a population, by ``torch.vmap`` over their tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from iql_torchrl.losses import Batch, IQLLoss
from iql_torchrl.losses.batch import Draw
from iql_torchrl.private_apis import has_hooks, keeps_batch_statistics


def stack_losses(losses: Sequence[IQLLoss]) -> IQLLoss:
    """A copy of the first loss whose parameters and hyperparameters are those of all, ``(P, ...)``.

    ``losses``: one for each member, of networks of the same shapes. Evaluate it with :class:`Lift`.
    Its state dict has the names of one loss.

    Raises ``ValueError`` on networks that cannot be stacked: with shared parameters, with statistics
    of batches, or with hooks.
    """
    first = losses[0]
    _check_stackable(first)
    loss = copy.deepcopy(first)
    loss.averaged_actor = None
    for attribute, params in list(first._modules.items()):
        if isinstance(params, TensorDictParams):
            setattr(loss, attribute, _stacked([each._modules[attribute] for each in losses]))
    like = next(first.parameters())
    for name in first.hyperparameters:
        kind, _, short = name.partition(".")
        values = torch.stack([each.hyperparameters[name] for each in losses])
        getattr(loss, kind)._buffers[short] = values.to(like)
    gammas = [each.value_estimator.gamma.reshape(()) for each in losses]
    loss.value_estimator._buffers["gamma"] = torch.stack(gammas).to(like.device)
    loss.reset_parameters_recursive = _refuse_reset  # type: ignore[method-assign]
    loss.sync_modules()
    return loss


def _refuse_reset() -> None:
    raise NotImplementedError(
        "parameters of a population are those of its members: initialise the losses again before they "
        "are stacked."
    )


def _check_stackable(loss: IQLLoss) -> None:
    if loss.shared.owners:
        name, key = next(iter(loss.shared.owners))
        raise ValueError(
            f"{name} shares its parameter {key!r} with another network, so members of a population "
            "cannot be stacked; use an encoder_network for what networks share."
        )
    for name in loss.network_names:
        for path, module in getattr(loss, name).named_modules():
            if keeps_batch_statistics(module) or has_hooks(module):
                what = "has hooks" if has_hooks(module) else "keeps statistics of batches"
                raise ValueError(
                    f"{name} has a {type(module).__name__} at {path!r}, which {what}, so members of a "
                    "population cannot be stacked. Train them one by one, or use LayerNorm."
                )


def _stacked(each: Sequence[Any]) -> TensorDictParams:
    """The members' parameters and buffers, ``(P, ...)`` in each entry."""
    rows: Any = torch.stack([params.data for params in each])
    stacked = rows.contiguous().unlock_()
    for key, leaf in list(each[0].items(True, True)):
        if isinstance(leaf, nn.Parameter):
            stacked.set(key, nn.Parameter(stacked.get(key), leaf.requires_grad))
    return TensorDictParams(stacked, no_convert=True)


def write_member(stacked: IQLLoss, number: int, loss: IQLLoss) -> None:
    """Copy weights, targets too, and hyperparameters of member ``number`` into a loss of one run."""
    with torch.no_grad():
        for name, params in stacked._modules.items():
            if isinstance(params, TensorDictParams):
                own: Any = loss._modules[name]
                for key, leaf in own.items(True, True):
                    leaf.data.copy_(params.get(key)[number])
    loss.load_hyperparameters({k: v[number] for k, v in stacked.hyperparameters.items()})


@dataclass(frozen=True)
class MemberDraw(Draw):
    """A random tensor ``(P, *batch, *entries)`` for members ``first`` to ``first + P`` of ``count``.

    Numbers are drawn for all ``count`` members, so that each gets the same on any number of ranks.
    """

    first: int = 0
    count: int = 0

    def fill(self, out: Tensor, generator: torch.Generator | None = None) -> Tensor:
        every = out.new_empty((self.count, *out.shape[1:]))
        super().fill(every, generator)
        return out.copy_(every[self.first : self.first + len(out)])


class Lift:
    """Evaluates the terms of a stacked loss (:func:`stack_losses`) for every member.

    Batches are ``(B,)``, the same for every member, or ``(P, B)``. A term's results have P as their
    first dimension. No parameter is shared, so the gradient of the sum of P losses trains each member
    as if it were alone.

    Args:
        loss: the stacked loss.
        members: P.
        first, count: the members are these, from ``first`` on, of ``count`` in all.
        generator: of the random tensors of eager and compiled updates; by default torch's.
    """

    def __init__(
        self,
        loss: IQLLoss,
        members: int,
        *,
        first: int = 0,
        count: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.loss, self.members, self.generator = loss, members, generator
        self._first, self._count = first, members if count is None else count

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and scalars of every member, each ``(P,)``; the batch is not written to."""
        batch = self.prepare_batch(tensordict)
        losses, metadata = self.evaluate(self.loss.terms, batch)
        return self.outputs(tensordict, losses, self.evaluate(self.loss.summary, batch, metadata))

    def evaluate(self, term: Callable[..., Any], batch: Batch, *arguments: Any) -> Any:
        """``term(batch, *arguments)`` for each member, arguments ``(P, ...)`` divided."""
        rows = dict(batch.data.items(True, True))
        own = len(batch.data.batch_size) == 2
        divided: dict[str, Any] = {"draws": dict(batch.draws), "arguments": arguments}
        divided |= self._tensors()
        same = Batch(batch.data, batch.mask, batch.weight)
        if own:
            present = {"mask": batch.mask, "weight": batch.weight}
            divided |= {"rows": rows, **{k: v for k, v in present.items() if v is not None}}

        def of_member(given: dict[str, Any]) -> Any:
            member = same
            if own:
                size = batch.data.batch_size[1:]
                data = TensorDict(batch_size=size)
                for key, entry in given["rows"].items():
                    data.set(key, entry)
                member = Batch(data, given.get("mask"), given.get("weight"))
            member = replace(member, draws=given["draws"], features={})
            with self._holding(given):
                return term(member, *given["arguments"])

        return torch.vmap(of_member, randomness="different")(divided)

    def _tensors(self) -> dict[str, Any]:
        """All tensors ``(P, ...)`` of the loss that differ between members."""
        loss = self.loss
        return {
            "tensors": {name: list(tensors) for name, tensors in loss.tensors.items()},
            "hyperparameters": loss.hyperparameters,
            "gamma": loss.value_estimator.gamma,
        }

    @contextmanager
    def _holding(self, given: Mapping[str, Any]) -> Iterator[None]:
        """A context in which the loss has one member's tensors."""
        before = self._tensors()
        self._hold(given)
        try:
            yield
        finally:
            self._hold(before)

    def _hold(self, given: Mapping[str, Any]) -> None:
        loss = self.loss
        loss.tensors.update(given["tensors"])
        for name, value in given["hyperparameters"].items():
            kind, _, short = name.partition(".")
            loss._modules[kind]._buffers[short] = value
        loss.value_estimator._buffers["gamma"] = given["gamma"]

    # -- the batch, and what is returned ---------------------------------------------------------------

    def random_inputs(self, batch_size: Sequence[int]) -> dict[str, Draw]:
        """:meth:`IQLLoss.random_inputs` of every member, ``(P, ...)``."""
        size = tuple(batch_size)[-1:]
        return {
            key: MemberDraw(
                (self.members, *draw.batch), draw.entries, draw.normal, self._first, self._count
            )
            for key, draw in self.loss.random_inputs(torch.Size(size)).items()
        }

    def prepare_batch(
        self, tensordict: TensorDictBase, draws: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """:meth:`IQLLoss.prepare_batch`, with random tensors for every member.

        Raises ``ValueError`` on another shape than ``(B,)`` or ``(P, B)``.
        """
        shape = tensordict.batch_size
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != self.members):
            raise ValueError(
                f"the batch has shape {tuple(shape)}; expected (B,) for all {self.members} members or "
                f"({self.members}, B)."
            )
        batch = self.loss.read_batch(tensordict)
        inputs = self.random_inputs(shape)
        return batch.with_draws(inputs, self.loss.parameters(), draws, self.generator)

    def outputs(
        self, batch: TensorDictBase, losses: dict[str, Tensor], summary: dict[str, Tensor]
    ) -> TensorDictBase:
        """Losses and scalars, each ``(P,)``; the batch, which members share, is not written to."""
        scalars = {k: v for k, v in summary.items() if k not in ("priority", "log_prob")}
        return TensorDict(losses | scalars, batch_size=[self.members])
