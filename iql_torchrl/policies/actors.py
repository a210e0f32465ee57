"""Policies with a distribution: TorchRL ``ProbabilisticActor`` modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Categorical, OneHot, TensorSpec
from torchrl.modules import Delta, ProbabilisticActor

from iql_torchrl.descriptions import describe_spec, faulty_bounds
from iql_torchrl.networks import AroundPerceptron, perceptron
from iql_torchrl.policies.distributions import (
    Choice,
    ClippedGaussian,
    ClippedMixture,
    OneHotChoice,
    SquashedGaussian,
)

__all__ = [
    "Bounds",
    "categorical",
    "deterministic",
    "gaussian",
    "mixture",
    "tanh_normal",
]

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class _Head(AroundPerceptron):
    """Base of the policies' networks: preprocess, MLP, affine map of [-1, 1] to the spec's bounds.

    ``limits``: the bounds, also the keyword arguments of the policy's distribution, which move with
    this module. They are no buffers: the state has centre and half range already.
    """

    centre: Tensor
    half_range: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bounds: tuple[Tensor, Tensor] | None,
        preprocess: nn.Module | None,
        mlp: dict[str, Any],
    ) -> None:
        super().__init__(preprocess, perceptron(in_features, out_features, **mlp))
        self.limits: dict[str, Tensor] = {}
        if bounds is not None:
            low, high = bounds
            self.limits = {"low": low, "high": high}
            self.register_buffer("centre", (high + low) / 2)
            self.register_buffer("half_range", (high - low) / 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> _Head:
        super()._apply(fn, *args, **kwargs)
        for name, bound in self.limits.items():
            self.limits[name] = fn(bound)
        return self

    def inside(self, x: Tensor) -> Tensor:
        return self.centre + self.half_range * x.tanh()


class _GaussianHead(_Head):
    """Mean inside the bounds; log-std a parameter vector (the paper's) or an output of the MLP."""

    def __init__(
        self, in_features: int, bounds: Bounds, state_dependent_std: bool, *rest: Any
    ) -> None:
        size = bounds[0].numel()
        super().__init__(in_features, (1 + state_dependent_std) * size, bounds, *rest)
        self.log_std = None if state_dependent_std else nn.Parameter(torch.zeros(size))

    def around(self, *parts: Any) -> tuple[Tensor, Tensor]:
        out = super().around(*parts)
        out, log_std = out.chunk(2, -1) if self.log_std is None else (out, self.log_std)
        std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * self.half_range
        return self.inside(out), std.expand_as(out)


class _SquashedHead(_Head):
    """Location before the tanh, and a state-dependent scale."""

    def around(self, *parts: Any) -> tuple[Tensor, Tensor]:
        loc, log_std = super().around(*parts).chunk(2, -1)
        return loc, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()


class _DeterministicHead(_Head):
    def around(self, *parts: Any) -> Tensor:
        return self.inside(super().around(*parts))


class _MixtureHead(_Head):
    def __init__(self, in_features: int, bounds: Bounds, num_components: int, *rest: Any) -> None:
        size = bounds[0].numel()
        super().__init__(in_features, num_components * (1 + size), bounds, *rest)
        self.shape = (num_components, size)
        self.log_std = nn.Parameter(torch.zeros(self.shape))

    def around(self, *parts: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = super().around(*parts)
        logits, loc = out[..., : self.shape[0]], out[..., self.shape[0] :].unflatten(-1, self.shape)
        std = self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * self.half_range
        return logits, self.inside(loc), std.expand_as(loc)


Bounds = tuple[Tensor, Tensor]


def gaussian(
    in_features: int,
    action_spec: TensorSpec,
    *,
    in_keys: Sequence[NestedKey] = ("observation",),
    state_dependent_std: bool = False,
    preprocess: nn.Module | None = None,
    **mlp: Any,
) -> ProbabilisticActor:
    """The paper's policy: Gaussian around a tanh mean; its log-std is a parameter vector in [-5, 2].

    Mean and standard deviation are in units of half the action range, so the official code's
    numbers apply to any bounds. Raises ``ValueError`` on a spec without finite bounds.
    """
    bounds = _bounds(action_spec)
    head = _GaussianHead(in_features, bounds, state_dependent_std, preprocess, mlp)
    return _actor(head, in_keys, ["loc", "scale"], action_spec, ClippedGaussian, head.limits)


def tanh_normal(
    in_features: int,
    action_spec: TensorSpec,
    *,
    in_keys: Sequence[NestedKey] = ("observation",),
    preprocess: nn.Module | None = None,
    **mlp: Any,
) -> ProbabilisticActor:
    """A squashed Gaussian, as TorchRL's ``TanhNormal``, with a state-dependent scale.

    A logged action exactly on a bound has a clamped, very negative log-probability here; use
    :func:`gaussian` for logs with such actions. Raises ``ValueError`` on an unbounded spec.
    """
    bounds = _bounds(action_spec)
    head = _SquashedHead(in_features, 2 * bounds[0].numel(), bounds, preprocess, mlp)
    return _actor(head, in_keys, ["loc", "scale"], action_spec, SquashedGaussian, head.limits)


def deterministic(
    in_features: int,
    action_spec: TensorSpec,
    *,
    in_keys: Sequence[NestedKey] = ("observation",),
    preprocess: nn.Module | None = None,
    **mlp: Any,
) -> ProbabilisticActor:
    """``a = pi(s)`` inside the bounds, for ``IQLLoss(actor_objective="mse")``.

    Raises ``ValueError`` on an unbounded spec.
    """
    bounds = _bounds(action_spec)
    head = _DeterministicHead(in_features, bounds[0].numel(), bounds, preprocess, mlp)
    return _actor(head, in_keys, ["param"], action_spec, Delta, {})


def mixture(
    in_features: int,
    action_spec: TensorSpec,
    *,
    num_components: int = 5,
    in_keys: Sequence[NestedKey] = ("observation",),
    preprocess: nn.Module | None = None,
    **mlp: Any,
) -> ProbabilisticActor:
    """Mixture of Gaussians around tanh means, for logs in which several policies acted in one state.

    Raises ``ValueError`` on an unbounded spec or ``num_components < 1``.
    """
    if isinstance(num_components, bool) or not isinstance(num_components, int):
        raise ValueError(f"num_components is {num_components!r}; expected a whole number >= 1.")
    if num_components < 1:
        raise ValueError(f"num_components is {num_components}; expected at least one.")
    bounds = _bounds(action_spec)
    head = _MixtureHead(in_features, bounds, num_components, preprocess, mlp)
    return _actor(
        head, in_keys, ["logits", "loc", "scale"], action_spec, ClippedMixture, head.limits
    )


def categorical(
    in_features: int,
    action_spec: TensorSpec,
    *,
    mask_key: NestedKey | None = None,
    in_keys: Sequence[NestedKey] = ("observation",),
    preprocess: nn.Module | None = None,
    **mlp: Any,
) -> ProbabilisticActor:
    """One of N actions; with ``mask_key="action_mask"`` one that the mask ``(*B, N)`` allows.

    Actions are one-hot for a ``OneHot`` spec and indices for a ``Categorical`` spec. Raises
    ``TypeError`` on another spec.
    """
    if not isinstance(action_spec, Categorical | OneHot):
        raise TypeError(
            f"action_spec is {type(action_spec).__name__}; expected a TorchRL Categorical "
            "or OneHot spec. For continuous actions use gaussian()."
        )
    num_actions = action_spec.space.n
    head = _Head(in_features, num_actions, None, preprocess, mlp)
    parameters = {"logits": "logits"} | ({} if mask_key is None else {"mask": mask_key})
    if isinstance(action_spec, OneHot):
        distribution: type = OneHotChoice
        options = {"dtype": action_spec.dtype}
    else:
        distribution, options = Choice, {}
    return _actor(head, in_keys, ["logits"], action_spec, distribution, options, parameters)


def _actor(
    head: _Head,
    in_keys: Sequence[NestedKey],
    out_keys: list[str],
    action_spec: TensorSpec,
    distribution: type,
    options: dict[str, Any],
    parameters: dict[str, NestedKey] | None = None,
) -> ProbabilisticActor:
    keys = [in_keys] if isinstance(in_keys, str) else list(in_keys)
    return ProbabilisticActor(
        TensorDictModule(head, in_keys=keys, out_keys=out_keys),
        in_keys=parameters or out_keys,
        spec=action_spec,
        distribution_class=distribution,
        distribution_kwargs=options,
    )


def _bounds(action_spec: TensorSpec) -> Bounds:
    space = getattr(action_spec, "space", None)
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    floats = isinstance(action_spec, TensorSpec) and action_spec.dtype.is_floating_point
    if low is None or high is None or not floats or action_spec.ndim != 1:
        raise ValueError(
            f"action_spec is {describe_spec(action_spec)}; expected a TorchRL Bounded spec of floats, "
            "shape (A,). For discrete actions use categorical()."
        )
    low, high = low.detach().clone(), high.detach().clone()
    # TorchRL's unbounded specs have the largest numbers of their dtype as bounds.
    largest = torch.finfo(low.dtype).max / 2
    pair = (bound.double().cpu().numpy() for bound in (low, high))
    if faults := faulty_bounds(*pair, largest=largest):
        raise ValueError(
            f"action_spec is {describe_spec(action_spec)}; {faults}. Pass a Bounded spec with the "
            "range the actuators accept, finite low < high."
        )
    return low, high
