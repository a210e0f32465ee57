"""Policies with a distribution, as TorchRL ``ProbabilisticActor`` modules.

A policy is a :class:`Head`, which maps observations to the parameters of a distribution, and that
distribution. All functions here take:

Args:
    in_features (int): number of features that the MLP reads.
    action_spec (TensorSpec): spec of the action. Of continuous actions a TorchRL ``Bounded`` of shape
        ``(A,)`` with finite bounds; another one raises ``ValueError``.

Keyword Args:
    in_keys (sequence of NestedKey): keys of the observations, joined on their last dimension.
        Default: ``("observation",)``.
    **network: keyword arguments of :class:`iql_torchrl.networks.AroundPerceptron`: ``hidden``,
        ``preprocess``, ``activation``, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Categorical, OneHot, TensorSpec
from torchrl.modules import Delta, ProbabilisticActor

from iql_torchrl.config import check_whole
from iql_torchrl.descriptions import describe_space, faulty_bounds
from iql_torchrl.networks import AroundPerceptron
from iql_torchrl.policies.distributions import (
    Choice,
    ClippedGaussian,
    ClippedMixture,
    OneHotChoice,
    SquashedGaussian,
    centre_and_half_range,
    unit_of,
)
from iql_torchrl.tolerance import rounding

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
Keys = Sequence[NestedKey]
OBSERVATION: Keys = ("observation",)
Bounds = tuple[Tensor, Tensor]


def gaussian(
    in_features: int,
    action_spec: TensorSpec,
    *,
    in_keys: Keys = OBSERVATION,
    state_dependent_std: bool = False,
    **network: Any,
) -> ProbabilisticActor:
    """The paper's policy: Gaussian around a tanh mean; its log-std is a parameter vector in [-5, 2].

    Mean and standard deviation are in units of half the action range, so the official code's
    numbers apply to any bounds. With ``state_dependent_std`` the log-std is an output of the MLP.
    Actions have a :class:`ClippedGaussian`. Raises ``ValueError`` on a spec without finite bounds.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> actor = gaussian(3, Bounded(-1.0, 1.0, (2,)), hidden=(64, 64))
        >>> actor(TensorDict(observation=torch.zeros(5, 3), batch_size=[5]))["action"].shape
        torch.Size([5, 2])
    """
    bounds = bounds_of(action_spec)
    size = bounds[0].numel()
    outputs, log_std_shape = (2 * size, None) if state_dependent_std else (size, (size,))
    head = Head(in_features, outputs, bounds, gaussian_parameters, log_std_shape, **network)
    return make_actor(head, in_keys, ["loc", "scale"], action_spec, ClippedGaussian, head.limits)


def tanh_normal(
    in_features: int, action_spec: TensorSpec, *, in_keys: Keys = OBSERVATION, **network: Any
) -> ProbabilisticActor:
    """A squashed Gaussian, as TorchRL's ``TanhNormal``, with a state-dependent scale.

    Actions have a :class:`SquashedGaussian`, which has no mode: ``ExplorationType.MODE`` raises
    ``RuntimeError``, as with ``TanhNormal``; take ``DETERMINISTIC``. A logged action exactly on a
    bound has a clamped, very negative log-probability; use :func:`gaussian` for datasets with such
    actions. Raises ``ValueError`` on a spec without finite bounds.
    """
    bounds = bounds_of(action_spec)
    head = Head(in_features, 2 * bounds[0].numel(), bounds, _squashed_parameters, **network)
    return make_actor(head, in_keys, ["loc", "scale"], action_spec, SquashedGaussian, head.limits)


def deterministic(
    in_features: int, action_spec: TensorSpec, *, in_keys: Keys = OBSERVATION, **network: Any
) -> ProbabilisticActor:
    """``a = pi(s)`` inside the bounds, for ``IQLLoss(actor_objective="mse")``.

    Actions have TorchRL's ``Delta``. Raises ``ValueError`` on a spec without finite bounds.
    """
    bounds = bounds_of(action_spec)
    head = Head(in_features, bounds[0].numel(), bounds, Head.inside, **network)
    return make_actor(head, in_keys, ["param"], action_spec, Delta, {})


def mixture(
    in_features: int,
    action_spec: TensorSpec,
    *,
    num_components: int = 5,
    in_keys: Keys = OBSERVATION,
    **network: Any,
) -> ProbabilisticActor:
    """Mixture of Gaussians around tanh means, for datasets of several behaviour policies.

    The log-std of each component is a parameter vector in [-5, 2]. Actions have a
    :class:`ClippedMixture`. Raises ``ValueError`` on a spec without finite bounds or
    ``num_components < 1``.
    """
    check_whole(num_components=num_components)
    bounds = bounds_of(action_spec)
    shape = (num_components, bounds[0].numel())
    outputs = num_components + num_components * bounds[0].numel()
    head = Head(in_features, outputs, bounds, _mixture_parameters, shape, **network)
    out_keys = ["logits", "loc", "scale"]
    return make_actor(head, in_keys, out_keys, action_spec, ClippedMixture, head.limits)


def categorical(
    in_features: int,
    action_spec: TensorSpec,
    *,
    mask_key: NestedKey | None = None,
    in_keys: Keys = OBSERVATION,
    **network: Any,
) -> ProbabilisticActor:
    """One of N actions; with ``mask_key="action_mask"`` one that the mask ``(*B, N)`` allows.

    Actions are one-hot for a ``OneHot`` spec (:class:`OneHotChoice`) and indices for a
    ``Categorical`` spec (:class:`Choice`). Raises ``TypeError`` on another spec.
    """
    if not isinstance(action_spec, Categorical | OneHot):
        raise TypeError(
            f"action_spec is {type(action_spec).__name__}; expected a TorchRL Categorical "
            "or OneHot spec. For continuous actions use gaussian()."
        )
    head = Head(in_features, action_spec.space.n, **network)
    reads = {"logits": "logits"} | ({} if mask_key is None else {"mask": mask_key})
    if isinstance(action_spec, OneHot):
        options = {"dtype": action_spec.dtype}
        return make_actor(head, in_keys, ["logits"], action_spec, OneHotChoice, options, reads)
    return make_actor(head, in_keys, ["logits"], action_spec, Choice, {}, reads)


class Head(AroundPerceptron):
    """Network of a policy: observations to ``outputs(head, out)``, ``out`` being the MLP's output.

    A dimension whose bounds are equal but for rounding is constant: every action has its centre
    there, and it does not count in log-probabilities.

    Args:
        in_features (int): number of features that the MLP reads.
        out_features (int): number of outputs of the MLP.
        bounds (tuple of Tensor, optional): low and high of the actions, ``(A,)`` each.
        outputs (callable, optional): maps the head and the MLP's output to the distribution's
            parameters. Default: the output itself.
        log_std_shape (sequence of int, optional): shape of the parameter ``log_std``, zero at first.
            Default: no such parameter.
        **network: keyword arguments of :class:`iql_torchrl.networks.AroundPerceptron`.

    Attributes:
        limits: the bounds as keyword arguments of the distribution; they move with this module. They
            are not buffers: the state has ``centre`` and ``half_range`` already. With a constant
            dimension ``limits`` has ``varying``, the mask of the others ``(A,)``.
        centre, half_range: buffers, those of the bounds.
    """

    centre: Tensor
    half_range: Tensor
    log_std: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bounds: Bounds | None = None,
        outputs: Callable[[Any, Tensor], Any] | None = None,
        log_std_shape: Sequence[int] | None = None,
        **network: Any,
    ) -> None:
        super().__init__(in_features, out_features, **network)
        self.outputs = outputs
        self.limits: dict[str, Tensor] = {}
        if bounds is not None:
            low, high = bounds
            self.limits = {"low": low, "high": high}
            centre, half_range = centre_and_half_range(low, high)
            self.register_buffer("centre", centre)
            self.register_buffer("half_range", half_range)
            constant = high - low <= rounding(np.float32) * torch.maximum(low.abs(), high.abs())
            if bool(constant.any()):
                self.limits["varying"] = ~constant
        self.log_std = None if log_std_shape is None else nn.Parameter(torch.zeros(*log_std_shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Head:
        super()._apply(fn, *args, **kwargs)
        # in place: the distribution's keyword arguments are this dictionary
        self.limits.update({name: fn(bound) for name, bound in self.limits.items()})
        return self

    @property
    def unit(self) -> Tensor:
        """Unit of standard deviations: the half range, 1 where a dimension is constant."""
        return unit_of(self.half_range, self.limits.get("varying"))

    def inside(self, x: Tensor) -> Tensor:
        """``x``, any numbers, mapped into the bounds by tanh."""
        return self.centre + self.half_range * x.tanh()

    def forward(self, *inputs: Tensor) -> Any:
        out = super().forward(*inputs)
        return out if self.outputs is None else self.outputs(self, out)


def gaussian_parameters(head: Head, out: Tensor) -> tuple[Tensor, Tensor]:
    """Mean inside the bounds and std; log-std is the parameter, or the second half of ``out``."""
    out, log_std = out.chunk(2, -1) if head.log_std is None else (out, head.log_std)
    return head.inside(out), (_std(log_std) * head.unit).expand_as(out)


def _squashed_parameters(head: Head, out: Tensor) -> tuple[Tensor, Tensor]:
    """Location before the tanh, and a state-dependent scale."""
    loc, log_std = out.chunk(2, -1)
    return loc, _std(log_std)


def _mixture_parameters(head: Any, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of M components, their means inside the bounds, and their standard deviations."""
    shape = head.log_std.shape[-2:]
    logits, loc = out.split([shape[0], shape.numel()], -1)
    loc = head.inside(loc.unflatten(-1, shape))
    return logits, loc, (_std(head.log_std) * head.unit).expand_as(loc)


def _std(log_std: Tensor) -> Tensor:
    return log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()


def make_actor(
    head: nn.Module,
    in_keys: Keys,
    out_keys: list[str],
    action_spec: TensorSpec,
    distribution: type,
    options: dict[str, Any],
    reads: dict[str, NestedKey] | None = None,
) -> ProbabilisticActor:
    """Actor of ``head``, which writes ``out_keys``, then ``distribution(**options)`` over these.

    ``reads``: key of each argument of the distribution. Default: ``out_keys``.
    """
    return ProbabilisticActor(
        TensorDictModule(head, in_keys=listed(in_keys), out_keys=out_keys),
        in_keys=reads or out_keys,
        spec=action_spec,
        distribution_class=distribution,
        distribution_kwargs=options,
    )


def listed(keys: Keys) -> list[NestedKey]:
    """``keys`` as a list; one name is one key."""
    return [keys] if isinstance(keys, str) else list(keys)


def bounds_of(action_spec: TensorSpec) -> Bounds:
    """Low and high of a vector of floats; ``ValueError`` on another spec or without finite bounds."""
    space = getattr(action_spec, "space", None)
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    floats = isinstance(action_spec, TensorSpec) and action_spec.dtype.is_floating_point
    if low is None or high is None or not floats or action_spec.ndim != 1:
        raise ValueError(
            f"action_spec is {describe_space(action_spec)}; expected a TorchRL Bounded spec of floats, "
            "shape (A,). For discrete actions use categorical()."
        )
    low, high = low.detach().clone(), high.detach().clone()
    # TorchRL's unbounded specs have the largest numbers of their dtype as bounds.
    largest = torch.finfo(low.dtype).max / 2
    if faults := faulty_bounds(low.double().cpu(), high.double().cpu(), largest=largest):
        raise ValueError(
            f"action_spec is {describe_space(action_spec)}; {faults}. Pass a Bounded spec with the "
            "range the actuators accept, finite low <= high."
        )
    return low, high
