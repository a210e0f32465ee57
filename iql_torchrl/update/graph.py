"""One whole update as a function of tensors, which ``compiled`` and ``captured`` make a graph of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from iql_torchrl.objectives.batch import Batch
from iql_torchrl.update.adam import Moments, StackedAdam, adam_step, log_betas, start
from iql_torchrl.update.flat import Flat, FlatStorage, Range
from iql_torchrl.update.step import IQLStep, Terms, clip
from iql_torchrl.update.targets import polyak_step

__all__ = ["GraphUpdate", "fits_a_graph", "is_on"]

Gradients = Sequence["Tensor | None"]


def fits_a_graph(optimizer: Optimizer) -> bool:
    """Whether the optimizer's update is :func:`iql_torchrl.update.adam.adam_step`."""
    unusual = ("amsgrad", "maximize", "differentiable")
    plain = type(optimizer) in (Adam, AdamW, StackedAdam)
    return plain and not any(g.get(name) for g in optimizer.param_groups for name in unusual)


class Part(NamedTuple):
    """What one Adam update changes: a parameter, a range of them, or a piece of a range."""

    parameter: Tensor
    gradient: Tensor
    average: Tensor
    square: Tensor
    steps: Tensor
    group: int
    network: int


class GraphUpdate:
    """Losses, gradients, clipping, Adam and Polyak step of ``step``, without its Python state.

    A call takes a batch and the optimizer's state as :class:`Moments`, and writes the new values in
    place; learning rates are tensors in it. With ``flat``, parameters, moments and targets are laid
    out in a :class:`FlatStorage` of the step, where they fit, and a range is updated as one tensor:
    the graph must then read parameters through :func:`update.views.through_ranges`.
    """

    def __init__(self, step: IQLStep, *, flat: bool = False) -> None:
        self.step = step
        self.generation = 0
        self.storage = _storage_of(step) if flat and step.members is None else None
        self.ranges: tuple[Range, ...] = ()
        self.rates: list[Tensor] = []
        self.logs: list[Tensor] = []
        self._list_parameters()
        if self.storage is not None:  # before anyone takes views of the parameters' data
            self.storage.current()

    def _list_parameters(self) -> None:
        """The trainable parameters of the optimizer; frozen ones are left out."""
        groups = self.step.optimizer.param_groups
        self._trained = self._trainable()
        self.parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        self.group_of = [i for i, g in enumerate(groups) for p in g["params"] if p.requires_grad]
        place = {id(p): i for i, p in enumerate(self.parameters)}
        listed = [p for group in groups for p in group["params"]]
        self._place_of = [place.get(id(p)) for p in listed]  # of all parameters, frozen ones too
        self.networks = [
            [place[id(p)] for p in network if id(p) in place] for network in self.step.trainable
        ]

    def _trainable(self) -> list[bool]:
        groups = self.step.optimizer.param_groups
        return [p.requires_grad for group in groups for p in group["params"]]

    def follow_freezing(self) -> None:
        """List the parameters again where one was frozen or unfrozen."""
        if self._trained != self._trainable():
            self._list_parameters()
            self.generation += 1

    # -- inside the graph ------------------------------------------------------------------------

    def __call__(self, batch: Batch, moments: Moments) -> Terms:
        """Losses and summary, detached: nothing may carry a gradient out of a graph."""
        losses, summary = self.step.update(batch, lambda loss: self._descend(loss, moments))
        self._move_targets(moments)
        return _detached(losses), _detached(summary)

    def _descend(self, loss: Tensor, moments: Moments) -> None:
        # a change of ``generation`` compiles again, since other parameters are trained then
        if self.generation < 0 or not loss.requires_grad:
            return
        gradients = list(torch.autograd.grad(loss.sum(), self.parameters, allow_unused=True))
        with torch.no_grad():
            split = self._in_ranges if self.ranges else self._one_by_one
            parts = split(gradients, moments)
            limit = self.step.max_grad_norm
            reached = [part.gradient for part in parts]
            for network in range(len(self.networks)):
                if limit is None:
                    break
                places = [i for i, part in enumerate(parts) if part.network == network]
                clipped = clip([reached[i] for i in places], limit, self.step.members)
                for i, gradient in zip(places, clipped, strict=True):
                    reached[i] = gradient
            adam_step(
                [part.parameter for part in parts],
                reached,
                moments._replace(
                    averages=[part.average for part in parts],
                    squares=[part.square for part in parts],
                    steps=[part.steps for part in parts],
                ),
                self.step.optimizer.param_groups,
                [part.group for part in parts],
            )

    def _one_by_one(self, gradients: Gradients, moments: Moments) -> list[Part]:
        """What the loss reaches, each parameter for itself."""
        network_of = {i: number for number, places in enumerate(self.networks) for i in places}
        return [
            Part(
                parameter.data,
                gradient,
                moments.averages[i],
                moments.squares[i],
                moments.steps[i],
                self.group_of[i],
                network_of.get(i, -1),
            )
            for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True))
            if gradient is not None
        ]

    def _in_ranges(self, gradients: Gradients, moments: Moments) -> list[Part]:
        """What the loss reaches: ranges, and pieces of ranges of which it reaches only some."""
        parts: list[Part] = []
        tensors = (moments.parameters, moments.averages, moments.squares, moments.steps)
        for form, parameter, average, square, steps in zip(self.ranges, *tensors, strict=True):
            places = [self._place_of[piece.parameter] for piece in form.pieces]
            reached = [None if place is None else gradients[place] for place in places]
            found = [gradient for gradient in reached if gradient is not None]
            group, network = form.group, form.network
            if form.whole and len(found) == len(reached):
                joined = form.join(found)
                parts.append(Part(parameter, joined, average, square, steps, group, network))
                continue
            for i, (piece, gradient) in enumerate(zip(form.pieces, reached, strict=True)):
                if gradient is not None:
                    of = [piece.of(flat) for flat in (parameter, average, square)]
                    parts.append(Part(of[0], gradient, of[1], of[2], steps[i], group, network))
        return parts

    def _move_targets(self, moments: Moments) -> None:
        updater, followed = self.step.target_updater, self.step.followed
        if not self.ranges or updater is None or not followed.targets:
            self.step.move_targets()
            return
        ranges = zip(self.ranges, moments.parameters, strict=True)
        live = [tensor for form, tensor in ranges if form.followed]
        targets = list(moments.targets)
        for one, target, inside in zip(*followed, self._inside, strict=True):
            if not inside:
                live.append(one)
                targets.append(target)
        polyak_step(targets, live, updater.eps)

    # -- before a call of the graph ----------------------------------------------------------------

    def moments(self) -> Moments:
        """The optimizer's state, made where there is none, and its current rates as tensors."""
        optimizer = self.step.optimizer
        self._follow_groups()
        groups = zip(optimizer.param_groups, self.rates, strict=True)
        rates = [g["lr"] if is_on(g["lr"], rate.device) else rate for g, rate in groups]
        if self.storage is not None:
            flat = self._follow_storage(self.storage)
            if flat is not None:
                tensors = (flat.averages, flat.squares, flat.steps)
                return Moments(*tensors, rates, self.logs, flat.parameters, flat.targets)
        self._start()
        states = [optimizer.state[p] for p in self.parameters]
        return Moments(
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            rates,
            self.logs,
        )

    def _start(self) -> None:
        """Make the states that the optimizer does not have yet."""
        optimizer = self.step.optimizer
        for parameter, number in zip(self.parameters, self.group_of, strict=True):
            group = optimizer.param_groups[number]
            on_device = any(group.get(name) for name in ("fused", "capturable"))
            where = parameter.device if on_device else torch.device("cpu")
            start(optimizer.state[parameter], parameter, where)

    def _follow_storage(self, storage: FlatStorage) -> Flat | None:
        flat = storage.current(self._start)
        if self.ranges is not storage.ranges:
            if self.ranges != storage.ranges:
                self.generation += 1
            self.ranges = storage.ranges
            self._inside = [storage.follows(live) for live in self.step.followed.live]
        return flat

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

    def flat_tensors(self) -> list[Tensor]:
        """The ranges that the graph reads and writes, of parameters and of targets."""
        flat = None if self.storage is None else self.storage.flat
        return [] if flat is None else [*flat.parameters, *flat.targets]

    def counted(self) -> None:
        """Say that the graph was called, which counts every parameter of a whole range once."""
        if self.storage is not None:
            self.storage.counted()

    def forget_rates(self) -> None:
        """Write the learning rates again at the next :meth:`moments`: the tensors hold others."""
        self._written = [None] * len(self.rates)


def is_on(rate: Any, device: torch.device) -> bool:
    """Whether a learning rate is a tensor that a program on ``device`` can read by itself."""
    return isinstance(rate, Tensor) and rate.device == device


def _detached(terms: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in terms.items()}


def _storage_of(step: IQLStep) -> FlatStorage:
    """The step's storage, which all its graphs share."""
    storage = step.storage
    if storage is None or storage.optimizer is not step.optimizer or storage.loss is not step.loss:
        storage = FlatStorage(step.loss, step.optimizer, list(zip(*step.followed, strict=True)))
        step.storage = storage
    return storage
