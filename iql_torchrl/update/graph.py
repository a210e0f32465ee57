"""One whole update as a function of tensors, which ``compiled`` and ``captured`` make a graph of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from iql_torchrl.config import chosen_products
from iql_torchrl.losses.batch import Batch
from iql_torchrl.update.adam import Moments, StackedAdam, adam_step, add_update, log_betas, start
from iql_torchrl.update.joined import summed_gradients
from iql_torchrl.update.step import IQLStep, Terms, clip

__all__ = ["GraphUpdate", "fits_a_graph", "is_on"]

Gradients = Sequence["Tensor | None"]


def fits_a_graph(optimizer: Optimizer) -> bool:
    """Whether the optimizer's update is :func:`iql_torchrl.update.adam.adam_step`."""
    unusual = ("amsgrad", "maximize", "differentiable")
    plain = type(optimizer) in (Adam, AdamW, StackedAdam)
    return plain and not any(g.get(name) for g in optimizer.param_groups for name in unusual)


class GraphUpdate:
    """Losses, gradients, clipping, Adam and Polyak step of ``step``, without its Python state.

    A call takes a batch and the optimizer's state as :class:`Moments`, and writes the new values in
    place; learning rates are tensors in it.
    """

    def __init__(self, step: IQLStep) -> None:
        self.step = step
        self.generation = 0
        self._products = chosen_products()
        self.rates: list[Tensor] = []
        self.logs: list[Tensor] = []
        self._list_parameters()

    def _list_parameters(self) -> None:
        """The trainable parameters of the optimizer; frozen ones are left out."""
        groups = self.step.optimizer.param_groups
        self._trained = self._trainable()
        self.parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        self.group_of = [i for i, g in enumerate(groups) for p in g["params"] if p.requires_grad]
        place = {id(p): i for i, p in enumerate(self.parameters)}
        self.networks = [
            [place[id(p)] for p in network if id(p) in place] for network in self.step.trainable
        ]

    def _trainable(self) -> list[bool]:
        groups = self.step.optimizer.param_groups
        return [p.requires_grad for group in groups for p in group["params"]]

    def follow_freezing(self) -> None:
        """List the parameters again where one was frozen or unfrozen; notice other products."""
        if self._products != chosen_products():
            self._products = chosen_products()
            self.generation += 1
        if self._trained != self._trainable():
            self._list_parameters()
            self.generation += 1

    # -- inside the graph ------------------------------------------------------------------------

    def __call__(self, batch: Batch, moments: Moments) -> Terms:
        """Losses and summary, detached: nothing may carry a gradient out of a graph."""
        uncounted: list[int] = []
        losses, summary = self.step.update(
            batch, lambda loss: self._descend(loss, moments, uncounted)
        )
        add_update(moments.steps, uncounted)
        self.step.move_targets()
        return _detached(losses), _detached(summary)

    def _descend(self, loss: Tensor, moments: Moments, uncounted: list[int]) -> None:
        """One step of Adam on ``loss``.

        ``uncounted``: places of parameters whose latest step ``moments.steps`` does not count yet, so
        that usually all steps of an update are counted at once. Those that ``loss`` reaches are added.
        """
        gradients = self._gradients(loss)
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        with torch.no_grad():
            if set(uncounted) & set(reached):  # shared with a network of the descent before
                add_update(moments.steps, uncounted)
                uncounted.clear()
            groups = self.step.optimizer.param_groups
            parameters = [p.data for p in self.parameters]
            adam_step(parameters, gradients, moments, groups, self.group_of)
        uncounted += reached

    def _gradients(self, loss: Tensor) -> Gradients:
        """Clipped gradients of :attr:`parameters`; None where the loss does not reach one."""
        # a change of ``generation`` compiles again, since other parameters are trained then
        if self.generation < 0 or not loss.requires_grad:
            return [None] * len(self.parameters)
        gradients: list[Any] = list(
            torch.autograd.grad(loss.sum(), self.parameters, allow_unused=True)
        )
        if self.step.ranks is not None:
            gradients = summed_gradients(gradients, self.step.ranks)
        limit = self.step.max_grad_norm
        for network in self.networks:
            if limit is None:
                break
            places = [i for i in network if gradients[i] is not None]
            clipped = clip([gradients[i] for i in places], limit, self.step.members)
            for i, gradient in zip(places, clipped, strict=True):
                gradients[i] = gradient
        return gradients

    # -- before a call of the graph ----------------------------------------------------------------

    def moments(self) -> Moments:
        """The optimizer's state, made where there is none, and its current rates as tensors."""
        optimizer = self.step.optimizer
        states = [optimizer.state[p] for p in self.parameters]
        for parameter, state, number in zip(self.parameters, states, self.group_of, strict=True):
            if not state:
                group = optimizer.param_groups[number]
                on_device = any(group.get(name) for name in ("fused", "capturable"))
                start(state, parameter, parameter.device if on_device else torch.device("cpu"))
        self._follow_groups()
        groups = zip(optimizer.param_groups, self.rates, strict=True)
        return Moments(
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            self.step.counts.of(states),
            [group["lr"] if is_on(group["lr"], rate.device) else rate for group, rate in groups],
            self.logs,
        )

    def _follow_groups(self) -> None:
        """Write changed learning rates and betas into the tensors that the graph reads."""
        groups = self.step.optimizer.param_groups
        if len(self.rates) != len(groups):
            # double, as the Python numbers that torch's optimizers compute with
            device = self.parameters[0].device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.rates = [torch.zeros((), dtype=dtype, device=device) for _ in groups]
            self.logs = [torch.zeros(2, dtype=dtype, device=device) for _ in groups]
            self._written: list[Any] = [None] * len(groups)
            self._betas: list[Any] = [None] * len(groups)
        for i, group in enumerate(groups):
            rate = group["lr"]
            if not is_on(rate, self.rates[i].device) and float(rate) != self._written[i]:
                self.rates[i].fill_(float(rate))
                self._written[i] = float(rate)
            if group["betas"] != self._betas[i]:
                self._betas[i] = group["betas"]
                self.logs[i].copy_(log_betas(group, self.logs[i]))

    def forget_rates(self) -> None:
        """Write the learning rates again at the next :meth:`moments`: the tensors hold others."""
        self._written = [None] * len(self.rates)


def is_on(rate: Any, device: torch.device) -> bool:
    """Whether a learning rate is a tensor that a program on ``device`` can read by itself."""
    return isinstance(rate, Tensor) and rate.device == device


def _detached(terms: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in terms.items()}
