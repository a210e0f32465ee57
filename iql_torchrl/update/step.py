"""One gradient update of IQL."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchrl.envs.utils import set_exploration_type
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from iql_torchrl.config import launches_kernels
from iql_torchrl.distributed import Ranks, group_size
from iql_torchrl.losses import Batch, IQLLoss
from iql_torchrl.losses.iql import LossesAndMetadata
from iql_torchrl.update.adam import JoinedCounts, along
from iql_torchrl.update.checks import check_optimizer, check_parts, check_settings
from iql_torchrl.update.divided import Part
from iql_torchrl.update.lifted import Lift

with warnings.catch_warnings():  # TorchRL warns about its own classes when these are first imported
    warnings.simplefilter("ignore", DeprecationWarning)
    from torchrl.trainers import OptimizationStepper, Trainer

LossesAndSummary = tuple[dict[str, Tensor], dict[str, Tensor]]
Gradients = list["Tensor | None"]


class Followed(NamedTuple):
    """Online tensors and, in the same order, the target tensors that follow them."""

    online: list[Tensor]
    targets: list[Tensor]


class Trained(NamedTuple):
    """The optimizer's parameters that are trained; those of each network by their places in the list.

    Parameter ``i`` is in the optimizer's group ``group_of[i]``.
    """

    parameters: list[Tensor]
    group_of: list[int]
    networks: list[list[int]]


class Step(OptimizationStepper):
    """What :class:`IQLStep` and the step that ``compiled`` returns have in common; abstract."""

    @property
    @abstractmethod
    def plain(self) -> IQLStep:
        """The step with the loss, the optimizer and all settings."""

    @abstractmethod
    def learn(self, batch: TensorDictBase) -> LossesAndSummary:
        """The update without schedulers, and without targets that ``SoftUpdate`` does not move.

        Returns losses, and the result of :meth:`IQLLoss.summary`, without gradient.
        """

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        plain = self.plain
        plain.check_trains()
        losses, summary = self.learn(batch)
        metrics = plain.evaluated.outputs(batch, losses, summary)
        if plain.target_updater is not None and not plain.followed.targets:
            plain.target_updater.step()
        for scheduler in plain.lr_schedulers:
            scheduler.step()
        return metrics

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """The same update, in the form in which TorchRL's trainers call it."""
        return self(sub_batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        raise TypeError(
            "a copied IQLStep would train nothing: its optimizer would hold other parameters. "
            "Copy the loss, build optimizer, updater and step from the copy, and load their states."
        )


class IQLStep(Step):
    """``step(batch) -> TensorDict`` of detached metrics: one update of every network.

    Also an ``OptimizationStepper``: ``Trainer(..., optimization_stepper=step)`` runs it in
    TorchRL's own trainers.

    Args:
        loss: an :class:`~iql_torchrl.IQLLoss` or :class:`~iql_torchrl.DiscreteIQLLoss` with
            reduction ``"mean"`` or ``"sum"``.
        optimizer: any torch optimizer that needs no closure, over all of the loss's trainable
            parameters; give each network its own parameter group, or join optimizers with
            TorchRL's ``group_optimizers``.
        target_updater: TorchRL's ``SoftUpdate`` or ``HardUpdate`` of this loss; None where
            something else moves the targets, as ``TargetNetUpdaterHook`` does in a trainer.

    Keyword Args:
        order: ``"sequential"`` is the official code's: V; then actor and critics with the new V
            and the same target critics; then the target. ``"simultaneous"``: one backward pass of
            all three losses, then the target.
        max_grad_norm: each network's gradient is scaled down to this L2 norm; ``None`` for never.
            Networks are clipped apart, so a large critic gradient does not slow the policy.
        lr_scheduler: one or more torch schedulers, stepped once an update.
        precision: ``"float32"`` leaves the networks' own dtype; ``"bfloat16"`` runs their matmuls
            under autocast, with parameters, losses and optimizer as they are. For TF32 on CUDA
            call ``torch.set_float32_matmul_precision("high")``.
        independent_ranks: True allows updates in a ``torch.distributed`` process group of more than
            one rank, where each rank that calls the step trains its own network: gradients are
            not reduced across ranks. For groups that serve something else, such as TorchRL's
            distributed collectors.

    ``ranks`` is None, or what ``iql_torchrl.distributed.data_parallel`` sets: an update then computes
    the losses of this rank's rows of the batch, and sums gradients over all ranks.

    The batch receives the priority and the log-probability, as from the loss itself. Random tensors
    that the loss reads are drawn when the batch is read: :meth:`IQLLoss.random_inputs`.

    Raises:
        ValueError: an unknown order or precision, ``max_grad_norm <= 0``, ``reduction="none"``, an
            updater of another loss, or trainable parameters missing from the optimizer.
        TypeError: ``optimizer`` is not a torch optimizer, or ``loss`` is not a loss of this package,
            such as a ``DistributedDataParallel`` around one.
        RuntimeError: from a call: under ``torch.no_grad()`` or ``torch.inference_mode()``, where
            nothing would be trained; or in a process group of more than one rank without
            ``data_parallel`` or ``independent_ranks``.
    """

    def __init__(
        self,
        loss: IQLLoss,
        optimizer: Optimizer,
        target_updater: TargetNetUpdater | None,
        *,
        order: str = "sequential",
        max_grad_norm: float | None = None,
        lr_scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
        precision: str = "float32",
        independent_ranks: bool = False,
    ) -> None:
        check_settings(order=order, max_grad_norm=max_grad_norm, precision=precision)
        if not isinstance(lr_scheduler, Sequence):
            lr_scheduler = () if lr_scheduler is None else (lr_scheduler,)
        check_parts(loss, optimizer, target_updater, lr_scheduler)
        self.loss = loss
        _ = loss.value_estimator  # TorchRL makes the default one here, and not in a traced update
        self.optimizer, self.target_updater = optimizer, target_updater
        self.order, self.max_grad_norm = order, max_grad_norm
        self.precision, self.independent_ranks = precision, independent_ranks
        self.ranks: Ranks | None = None
        self.lr_schedulers: tuple[LRScheduler, ...] = tuple(lr_scheduler)
        follows = type(target_updater) is SoftUpdate
        self.followed = Followed(*loss.target_pairs()) if follows else Followed([], [])
        self.averaged = Followed(*loss.average_pairs())
        self._average = loss.average
        self.lift: Lift | None = None
        self._flags: list[bool] | None = None
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._missing = [p for p in loss.parameters() if id(p) not in given]
        self.list_trained()
        self.counts = JoinedCounts()  # which all graphs of this step share

    @property
    def plain(self) -> IQLStep:
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        where: torch.device = self.optimizer.param_groups[0]["params"][0].device
        return where

    @property
    def evaluated(self) -> IQLLoss | Lift:
        """The part that reads batches and makes the metrics: the loss, or a population's lift."""
        return self.loss if self.lift is None else self.lift

    # -- the update --------------------------------------------------------------------------------

    def learn(self, batch: TensorDictBase) -> LossesAndSummary:
        with self.modes():
            result = self.update(self.evaluated.prepare_batch(batch), self._descend)
            self.move_targets()
            return result

    def update(self, batch: Batch, descend: Callable[[Tensor], None]) -> LossesAndSummary:
        """Losses and summary of one update, in which ``descend`` makes the optimizer's steps."""
        batch = replace(batch, features={})
        if self.ranks is None:
            losses, metadata = self._terms(batch, descend)
            summary = self.evaluate(self.loss.summary, batch, metadata)
        else:
            part = Part(self.loss, batch, self.ranks)
            losses, metadata = self._terms(part.batch, lambda loss: descend(part.share_of(loss)))
            losses, summary = part.joined(losses, metadata)
        return _detached(losses), _detached(summary)

    def _terms(self, batch: Batch, descend: Callable[[Tensor], None]) -> LossesAndMetadata:
        """The algorithm: losses, and the joined metadata of all terms."""
        loss = self.loss
        if self.order == "simultaneous":
            losses, metadata = self.evaluate(loss.terms, batch)
            descend(losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"])
            return losses, metadata
        of_value, first = self.evaluate(loss.value_phase, batch)
        descend(of_value["loss_value"])
        if loss.encoder is not None and loss.encoder.gradient == "all":  # the encoder has moved too
            batch = replace(batch, features={})
        target_qvalue = first.pop("target_qvalue")
        rest, second = self.evaluate(loss.policy_phase, batch, target_qvalue)
        descend(rest["loss_actor"] + rest["loss_qvalue"])
        return rest | of_value, first | second

    def evaluate(self, term: Callable[..., Any], batch: Batch, *arguments: Any) -> Any:
        """A term of the loss; of a population, that of each member."""
        if self.lift is None:
            return term(batch, *arguments)
        return self.lift.evaluate(term, batch, *arguments)

    def _descend(self, loss: Tensor) -> None:
        """One optimizer step on ``loss``; parameters without a gradient are not changed."""
        if not loss.requires_grad:  # every network it reaches is frozen
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        loss.sum().backward()  # of a population's runs; one number otherwise
        if self.ranks is not None or self.max_grad_norm is not None:
            parameters = self.list_trained().parameters
            gradients = self.summed_and_clipped([parameter.grad for parameter in parameters])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        self.optimizer.step()

    def summed_and_clipped(self, gradients: Gradients) -> Gradients:
        """Gradients of :attr:`trained`, summed over ranks, then each network's scaled down."""
        if self.ranks is not None:
            gradients = self.ranks.sum_each(gradients)
        for places in self.trained.networks if self.max_grad_norm is not None else ():
            of_network = [gradients[i] for i in places]
            for i, gradient in zip(places, self._clipped(of_network), strict=True):
                gradients[i] = gradient
        return gradients

    def _clipped(self, gradients: Gradients) -> Gradients:
        """Gradients of one network scaled down to the L2 norm."""
        dims = 0 if self.lift is None else 1  # of a population each member's own
        rows = [g.flatten(dims) for g in gradients if g is not None]
        if not rows:
            return gradients
        if torch.compiler.is_compiling() and launches_kernels(rows[0].device):
            square = torch.cat(rows, -1).square().sum(-1)  # not a kernel for each gradient
        else:
            square = torch.stack([row.square().sum(-1) for row in rows]).sum(0)
        limit: Any = self.max_grad_norm
        scale = (limit / (square.sqrt() + 1e-6)).clamp(max=1.0)
        return [g if g is None else g * along(scale, g) for g in gradients]

    def move_targets(self) -> None:
        """The step of a ``SoftUpdate`` (of no other updater), and that of the averaged policy."""
        _polyak_step(self.averaged.targets, self.averaged.online, self.loss.actor_ema)
        if self.target_updater is not None and self.followed.targets:
            _polyak_step(self.followed.targets, self.followed.online, self.target_updater.eps)

    # -- what it needs -----------------------------------------------------------------------------

    @contextmanager
    def modes(self) -> Iterator[None]:
        """A context in which networks are evaluated as in an update."""
        half: Any = nullcontext()
        if self.precision == "bfloat16":
            half = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        mode = set_exploration_type(self.loss.deterministic_sampling_mode)
        with mode, set_recurrent_mode(True), half:
            yield

    def list_trained(self) -> Trained:
        """Bring :attr:`trained` up to date where parameters were frozen or unfrozen; returns it."""
        groups = self.optimizer.param_groups
        flags = [p.requires_grad for group in groups for p in group["params"]]
        if flags != self._flags:
            self._flags = flags
            parameters = [p for group in groups for p in group["params"] if p.requires_grad]
            group_of = [i for i, g in enumerate(groups) for p in g["params"] if p.requires_grad]
            place = {id(p): i for i, p in enumerate(parameters)}
            of_loss = [(n, place[id(p)]) for n, p in self.loss.named_parameters() if id(p) in place]
            networks = [
                [i for name, i in of_loss if name.startswith(f"{part}.")]
                for part in self.loss.parts_with_parameters
            ]
            self.trained = Trained(parameters, group_of, networks)
        return self.trained

    def check_trains(self) -> None:
        """Raise an error where an update would compute losses and not train what was asked.

        ``ValueError``: the optimizer lacks a parameter that requires a gradient. ``RuntimeError``: in
        ``torch.inference_mode()`` or ``torch.no_grad()``, where no gradient exists; where an average of
        the policy was begun after the step was built; and in a ``torch.distributed`` process group of
        several ranks over which gradients are not summed, unless these are independent.
        """
        for mode, on in (
            ("torch.inference_mode()", torch.is_inference_mode_enabled()),
            ("torch.no_grad()", not torch.is_grad_enabled()),
        ):
            if on:
                raise RuntimeError(
                    f"the update was called under {mode}, where no gradients exist, so it would return "
                    "losses and train nothing. Call it outside of that block or decorator; evaluation "
                    "alone belongs inside."
                )
        if self.loss.average is not self._average:
            raise RuntimeError(
                "loss.average_actor() was called after this step was built, which would never update "
                "that average; call it before IQLStep(loss, ...), or build a new step of the optimizer."
            )
        if any(parameter.requires_grad for parameter in self._missing):
            check_optimizer(self.loss, self.optimizer)
        if self.independent_ranks or self.ranks is not None:
            return
        if (ranks := group_size()) > 1:
            raise RuntimeError(
                f"the torch.distributed process group has {ranks} ranks, and this update does not "
                "reduce gradients across ranks: each rank would train a network of its own. To train "
                "one network on all ranks, write step = data_parallel(step, Ranks.from_environment()) "
                "with both names from iql_torchrl.distributed; to divide the runs of a population, "
                "give IQLPopulation ranks=Ranks.from_environment(). If the group serves something "
                "else, such as a distributed collector, and each rank is to train its own network, "
                "build IQLStep(..., independent_ranks=True) or set step.independent_ranks = True."
            )

    def state_dict(self) -> dict[str, Any]:
        """States of optimizer, schedulers and target updater, and the hyperparameters' values.

        The networks' state is the loss's.
        """
        updater = self.target_updater
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_schedulers": [scheduler.state_dict() for scheduler in self.lr_schedulers],
            "target_updater": None if updater is None else updater.state_dict(),
            "hyperparameters": {k: v.clone() for k, v in self.loss.hyperparameters.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` when the state holds another number of schedulers."""
        schedulers = state_dict["lr_schedulers"]
        if len(schedulers) != len(self.lr_schedulers):
            raise ValueError(
                f"the state holds {len(schedulers)} lr_scheduler states and this step has "
                f"{len(self.lr_schedulers)}; build the step as it was when the state was saved."
            )
        self.loss.load_hyperparameters(state_dict.get("hyperparameters", {}))  # older states: none
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for scheduler, state in zip(self.lr_schedulers, schedulers, strict=True):
            scheduler.load_state_dict(state)
        if self.target_updater is not None and state_dict["target_updater"] is not None:
            self.target_updater.load_state_dict(state_dict["target_updater"])


def part_of(step: Any, name: str) -> Any:
    """The attribute ``name`` of a step; a compiled one has it as ``plain``, a captured as ``step``."""
    for holder in (step, getattr(step, "plain", None), getattr(step, "step", None)):
        part = getattr(holder, name, None)
        if part is not None:
            return part
    return None


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _polyak_step(targets: Sequence[Tensor], online: Sequence[Tensor], eps: float) -> None:
    """``target = eps * target + (1 - eps) * online``, in place, as TorchRL's ``SoftUpdate``."""
    if torch.compiler.is_compiling():  # on CUDA one kernel fewer than the foreach form
        for target, parameter in zip(targets, online, strict=True):
            target.data.lerp_(parameter.data, 1 - eps)
    elif targets:
        get_ema_multi_avg_fn(eps)(list(targets), list(online), 0)
