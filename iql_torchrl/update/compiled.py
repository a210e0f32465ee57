"""``compiled``: the whole update as one graph under ``torch.compile``, where that can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torchrl import logger as torchrl_logger

from iql_torchrl.data.categories import category_limits, check_categories
from iql_torchrl.host import mark_stepped, tracing_gradients
from iql_torchrl.objectives.batch import Batch
from iql_torchrl.update.adam import StackedAdam, along
from iql_torchrl.update.guards import check_update_trains
from iql_torchrl.update.step import IQLStep, Terms, clip

__all__ = ["CompiledStep", "compiled"]

Gradients = Sequence["Tensor | None"]
KEPT_GUARDS = (
    "AUTOGRAD_SAVED_TENSORS_HOOKS",
    "CONSTANT_MATCH",
    "DEFAULT_DEVICE",
    "DETERMINISTIC_ALGORITHMS",
    "EQUALS_MATCH",
    "FUNCTORCH_STACK_MATCH",
    "GLOBAL_STATE",
    "GRAD_MODE",
    "ID_MATCH",
    "SHAPE_ENV",
    "TENSOR_MATCH",
    "TORCH_FUNCTION_STATE",
)
NOISE = ("EMPTY_NN_MODULE_HOOKS_DICT", "HASATTR", "NOT_PRESENT_IN_GENERIC_DICT")
INNER = ("G[", "type(", "dict(", "list(")  # of modules, classes, imports


def compiled(step: IQLStep, **torch_compile_kwargs: Any) -> IQLStep:
    """The same update under ``torch.compile``; shares every part with ``step``.

    With ``Adam`` or ``AdamW`` (without ``amsgrad``, ``maximize``, ``differentiable``) losses,
    gradients, clipping, optimizer and ``SoftUpdate`` are one graph; the optimizer's own state is
    read and written, and its learning rates are tensors, so schedules do not compile again. With
    any other optimizer the graphs end at the gradients, and ``optimizer.step()`` runs as it is; a
    note says so. ``HardUpdate`` and schedulers run outside in any case.

    Keyword arguments go to ``torch.compile``: ``fullgraph=True`` unless you say otherwise, and on
    a CPU Inductor's C++ wrapper unless ``mode`` or ``options`` is given. The first call compiles,
    for tens of seconds; batches of another shape compile again. On a CPU the step raises
    ``ValueError`` on categories that the networks' ``OneHot`` does not know; elsewhere asking would
    wait for the device.
    """
    if not isinstance(step, IQLStep):
        raise TypeError(f"step is {type(step).__name__}; wanted an IQLStep, such as agent.step.")
    options = {"fullgraph": True} | torch_compile_kwargs
    on_cpu = all(p.device.type == "cpu" for p in step.loss.parameters())
    if not {"mode", "options", "backend"} & set(options):
        options["options"] = {"guard_filter_fn": _worth_checking}
        if on_cpu:
            options["options"]["cpp_wrapper"] = True
    return CompiledStep(step, options)


def _worth_checking(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards to keep: thousands watch classes, hooks and module internals.

    Kept: all about the batch; tensors; numbers and flags (knobs, modes); what step, loss, estimator
    and updater are; global state of torch. Of networks' internals only tensors, numbers and flags.
    """
    return [
        guard.name.startswith("batch")
        or (
            not guard.name.startswith(INNER)
            and (
                guard.guard_type in KEPT_GUARDS
                or ("network" not in guard.name and guard.guard_type not in NOISE)
            )
        )
        for guard in guards
    ]


class CompiledStep(IQLStep):
    """The update as graphs over the parts of another step; ``written_out``: as a single one."""

    def __init__(self, step: IQLStep, options: dict[str, Any]) -> None:
        self.__dict__.update(step.__dict__)
        self.generation = 0
        self._list_parameters()
        self.limits = category_limits(self.loss)
        self.written_out = _written_out(self.optimizer)
        if not self.written_out:
            torchrl_logger.warning(
                f"{type(self.optimizer).__name__} is not compiled: the graphs end at the gradients."
            )
        self._rates: list[Tensor] = []
        self._filled: list[float] = []
        self._whole = torch.compile(self.update, **options)
        self._value_part = torch.compile(self._value_gradients, **options)
        self._policy_part = torch.compile(self._policy_gradients, **options)
        self._all_parts = torch.compile(self._all_gradients, **options)

    def _list_parameters(self) -> None:
        """What the optimizer moves; what was frozen since the step was made rests."""
        groups = self.optimizer.param_groups
        self._trained = [p.requires_grad for group in groups for p in group["params"]]
        self.parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        self._group_of = [i for i, g in enumerate(groups) for p in g["params"] if p.requires_grad]
        place = {id(p): i for i, p in enumerate(self.parameters)}
        self._networks = [
            [place[id(p)] for p in network if id(p) in place] for network in self._trainable
        ]

    def _follow_freezing(self) -> None:
        groups = self.optimizer.param_groups
        if self._trained != [p.requires_grad for group in groups for p in group["params"]]:
            self._list_parameters()
            self.generation += 1

    def learn(self, batch: TensorDictBase) -> Terms:
        check_update_trains(independent_ranks=self.independent_ranks)
        self._follow_freezing()
        loss = self.loss
        with self.setting(), tracing_gradients():
            read = loss.read(batch)
            if self.limits and self._device == "cpu":  # elsewhere it would wait for the device
                check_categories(read.data, self.limits)
            if self.written_out:
                losses, summary = self._whole(read, *self.slots())
                mark_stepped(self.optimizer)
                return losses, summary
            losses, metadata = self._in_parts(read)
            super()._move_targets()
            return losses, loss.summary(read, metadata)

    # Graphs. The terms' values are detached: nothing may carry a gradient out of a graph.

    def update(
        self,
        batch: Batch,
        averages: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
        rates: list[Tensor],
    ) -> Terms:
        slots = (averages, squares, steps, rates)
        if self.order == "sequential":
            value, about_value, target_qvalue, gradients = self._value_gradients(batch)
            self._descend_written_out(gradients, *slots)
            losses, metadata, gradients = self._policy_gradients(batch, target_qvalue)
            losses, metadata = {**losses, "loss_value": value}, about_value | metadata
        else:
            losses, metadata, gradients = self._all_gradients(batch)
        self._descend_written_out(gradients, *slots)
        self._move_targets()
        return losses, self.loss.summary(batch, metadata)

    def _value_gradients(self, batch: Batch) -> tuple[Tensor, Any, Tensor, list[Tensor | None]]:
        target_qvalue = self.loss.target_qvalue(batch)
        loss, metadata = self.loss.value_term(batch, target_qvalue)
        return loss.detach(), _detached(metadata), target_qvalue, self._gradients(loss)

    def _policy_gradients(self, batch: Batch, target_qvalue: Tensor) -> Any:
        losses, metadata = self._terms_given_value(batch, target_qvalue)
        gradients = self._gradients(losses["loss_actor"] + losses["loss_qvalue"])
        return _detached(losses), _detached(metadata), gradients

    def _all_gradients(self, batch: Batch) -> Any:
        losses, metadata = self.loss.terms(batch)
        total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]
        return _detached(losses), _detached(metadata), self._gradients(total)

    def _gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Of every parameter the optimizer holds; None where the loss does not reach it."""
        if self.generation < 0 or not loss.requires_grad:  # a guard on what is frozen
            return [None] * len(self.parameters)
        found = torch.autograd.grad(loss.sum(), self.parameters, allow_unused=True)
        gradients: list[Tensor | None] = list(found)
        if self.max_grad_norm is not None:
            for network in self._networks:
                places, reached = [], []
                for i in network:
                    gradient = gradients[i]
                    if gradient is not None:
                        places.append(i)
                        reached.append(gradient)
                clipped = clip(reached, self.max_grad_norm, self.members)
                for i, gradient in zip(places, clipped, strict=True):
                    gradients[i] = gradient
        return gradients

    def _descend_written_out(
        self,
        gradients: Gradients,
        averages: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
        rates: list[Tensor],
    ) -> None:
        """Adam or AdamW (Loshchilov & Hutter 2019), as torch's, on what the loss reaches."""
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if not reached:
            return
        with torch.no_grad():
            sizes, roots = self._corrections(reached, steps, rates)
            for i, size, root in zip(reached, sizes, roots, strict=True):
                gradient = gradients[i]
                assert gradient is not None
                group = self.optimizer.param_groups[self._group_of[i]]
                (beta1, beta2), decay = group["betas"], group["weight_decay"]
                parameter, rate = self.parameters[i].data, rates[self._group_of[i]]
                if "rates" in group:  # one a run
                    size = along(size * group["rates"], parameter)
                    rate = along(rate * group["rates"], parameter)
                if decay and (group.get("decoupled") or group.get("decoupled_weight_decay")):
                    parameter.mul_(1 - rate * decay)
                elif decay:
                    gradient = gradient + decay * parameter
                averages[i].lerp_(gradient, 1 - beta1)
                squares[i].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                parameter.sub_(size * averages[i] / (squares[i].sqrt() / root + group["eps"]))

    def _corrections(
        self, reached: list[int], steps: list[Tensor], rates: list[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Count the update; step sizes and roots of Adam's bias corrections, one per parameter.

        Powers are written as exponentials of one vector: Inductor stores those once, and would
        reckon ``beta**count`` anew for every element of every parameter.
        """
        rate = torch.stack([rates[self._group_of[i]] for i in reached])
        for i in reached:
            steps[i].add_(1)
        count = torch.stack([steps[i] for i in reached]).to(rate)
        logs = torch.stack([self._logs[self._group_of[i]] for i in reached])
        remaining = (count.unsqueeze(-1) * logs).exp()
        return (
            (rate / (1 - remaining[:, 0])).unbind(),
            (1 - remaining[:, 1]).sqrt().unbind(),
        )

    def _move_targets(self) -> None:
        """``SoftUpdate``'s step, for a graph."""
        if self.target_updater is None or not self._pairs[0]:
            return
        share = 1 - self.target_updater.eps
        with torch.no_grad():
            for live, target in zip(*self._pairs, strict=True):
                target.data.lerp_(live.data, share)

    # The host's side.

    def _in_parts(self, batch: Batch) -> Terms:
        if self.order == "simultaneous":
            losses, metadata, gradients = self._all_parts(batch)
        else:
            value, about_value, target_qvalue, gradients = self._value_part(batch)
            self._step_optimizer(gradients)
            losses, metadata, gradients = self._policy_part(batch, target_qvalue)
            losses, metadata = {**losses, "loss_value": value}, about_value | metadata
        self._step_optimizer(gradients)
        return losses, metadata

    def _step_optimizer(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def slots(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The optimizer's state, made as the optimizer would, and its rates as tensors."""
        states = [self.optimizer.state[p] for p in self.parameters]
        for parameter, state in zip(self.parameters, states, strict=True):
            if not state:
                on_device = bool({"fused", "capturable"} & _switched_on(self.optimizer))
                where = parameter.device if on_device else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=where)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        groups = self.optimizer.param_groups
        if len(self._rates) != len(groups):
            # double, as the numbers of Python that torch's optimizers reckon with
            device = self.parameters[0].device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._rates = [torch.zeros((), dtype=dtype, device=device) for _ in groups]
            self._filled = [float("nan")] * len(groups)
            self._logs = [torch.zeros(2, dtype=dtype, device=device) for _ in groups]
            self._betas: list[Any] = [None] * len(groups)
        for i, group in enumerate(groups):
            rate = group["lr"]
            if not isinstance(rate, Tensor) and rate != self._filled[i]:
                self._rates[i].fill_(rate)
                self._filled[i] = rate
            if group["betas"] != self._betas[i]:
                self._betas[i] = group["betas"]
                logs = [math.log(beta) if beta else -math.inf for beta in group["betas"]]
                self._logs[i].copy_(torch.tensor(logs, dtype=torch.float64))
        rates = zip(groups, self._rates, strict=True)
        return (
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            [g["lr"] if isinstance(g["lr"], Tensor) else rate for g, rate in rates],
        )

    def forget_rates(self) -> None:
        """Somebody else wrote into the tensors of the learning rates."""
        self._filled = [float("nan")] * len(self._filled)


def _written_out(optimizer: Optimizer) -> bool:
    """Whether the optimizer's update is the one written out above."""
    unusual = ("amsgrad", "maximize", "differentiable")
    plain = type(optimizer) in (Adam, AdamW, StackedAdam)
    return plain and not any(g.get(name) for g in optimizer.param_groups for name in unusual)


def _switched_on(optimizer: Optimizer) -> set[str]:
    return {name for name, value in optimizer.defaults.items() if value is True}


def _detached(terms: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in terms.items()}
