"""Policies with a distribution, as TorchRL ``ProbabilisticActor`` modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical, OneHot, TensorSpec
from torchrl.modules import Delta, ProbabilisticActor

from iql_torchrl.config import check_whole
from iql_torchrl.descriptions import describe_space, faulty_bounds
from iql_torchrl.policies.distributions import (
    Bounds,
    Choice,
    ClippedGaussian,
    ClippedMixture,
    DeterministicHead,
    GaussianHead,
    Head,
    MixtureHead,
    OneHotChoice,
    SquashedGaussian,
    SquashedHead,
)


def gaussian(
    in_features: int,
    action_spec: TensorSpec,
    *,
    in_keys: Sequence[NestedKey] = ("observation",),
    state_dependent_std: bool = False,
    **network: Any,
) -> ProbabilisticActor:
    """The paper's policy: Gaussian around a tanh mean; its log-std is a parameter vector in [-5, 2].

    Mean and standard deviation are in units of half the action range, so the official code's
    numbers apply to any bounds. Raises ``ValueError`` on a spec without finite bounds.
    """
    bounds = bounds_of(action_spec)
    size = bounds[0].numel()
    outputs, log_std_shape = (2 * size, None) if state_dependent_std else (size, (size,))
    head = GaussianHead(in_features, outputs, bounds, log_std_shape, **network)
    return make_actor(head, in_keys, ["loc", "scale"], action_spec, ClippedGaussian, head.limits)


def tanh_normal(
    in_features: int,
    action_spec: TensorSpec,
    *,
    in_keys: Sequence[NestedKey] = ("observation",),
    **network: Any,
) -> ProbabilisticActor:
    """A squashed Gaussian, as TorchRL's ``TanhNormal``, with a state-dependent scale.

    A logged action exactly on a bound has a clamped, very negative log-probability here; use
    :func:`gaussian` for logs with such actions. Raises ``ValueError`` on an unbounded spec.
    """
    bounds = bounds_of(action_spec)
    head = SquashedHead(in_features, 2 * bounds[0].numel(), bounds, **network)
    return make_actor(head, in_keys, ["loc", "scale"], action_spec, SquashedGaussian, head.limits)


def deterministic(
    in_features: int,
    action_spec: TensorSpec,
    *,
    in_keys: Sequence[NestedKey] = ("observation",),
    **network: Any,
) -> ProbabilisticActor:
    """``a = pi(s)`` inside the bounds, for ``IQLLoss(actor_objective="mse")``.

    Raises ``ValueError`` on an unbounded spec.
    """
    bounds = bounds_of(action_spec)
    head = DeterministicHead(in_features, bounds[0].numel(), bounds, **network)
    return make_actor(head, in_keys, ["param"], action_spec, Delta, {})


def mixture(
    in_features: int,
    action_spec: TensorSpec,
    *,
    num_components: int = 5,
    in_keys: Sequence[NestedKey] = ("observation",),
    **network: Any,
) -> ProbabilisticActor:
    """Mixture of Gaussians around tanh means, for logs in which several policies acted in one state.

    Raises ``ValueError`` on an unbounded spec or ``num_components < 1``.
    """
    check_whole(num_components=num_components)
    bounds = bounds_of(action_spec)
    size = bounds[0].numel()
    outputs = num_components * (1 + size)
    head = MixtureHead(in_features, outputs, bounds, (num_components, size), **network)
    out_keys = ["logits", "loc", "scale"]
    return make_actor(head, in_keys, out_keys, action_spec, ClippedMixture, head.limits)


def categorical(
    in_features: int,
    action_spec: TensorSpec,
    *,
    mask_key: NestedKey | None = None,
    in_keys: Sequence[NestedKey] = ("observation",),
    **network: Any,
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
    head = Head(in_features, action_spec.space.n, None, **network)
    reads = {"logits": "logits"} | ({} if mask_key is None else {"mask": mask_key})
    one_hot = isinstance(action_spec, OneHot)
    distribution: type = OneHotChoice if one_hot else Choice
    options = {"dtype": action_spec.dtype} if one_hot else {}
    return make_actor(head, in_keys, ["logits"], action_spec, distribution, options, reads)


def make_actor(
    head: nn.Module,
    in_keys: Sequence[NestedKey],
    out_keys: list[str],
    action_spec: TensorSpec,
    distribution: type,
    options: dict[str, Any],
    reads: dict[str, NestedKey] | None = None,
) -> ProbabilisticActor:
    """``head``, which writes ``out_keys``, then ``distribution(**options)`` over these.

    ``reads``: the keys of the distribution's arguments, where they are others than ``out_keys``.
    """
    return ProbabilisticActor(
        TensorDictModule(head, in_keys=listed(in_keys), out_keys=out_keys),
        in_keys=reads or out_keys,
        spec=action_spec,
        distribution_class=distribution,
        distribution_kwargs=options,
    )


def listed(keys: Sequence[NestedKey]) -> list[NestedKey]:
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
