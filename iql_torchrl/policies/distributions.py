"""Distributions of actions inside the spec, and the networks that give their parameters.

No distribution checks its arguments: such a check reads a tensor, which on a GPU waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributions as D

from iql_torchrl.networks import AroundPerceptron
from iql_torchrl.tolerance import rounding

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
Bounds = tuple[Tensor, Tensor]


class _BoundedGaussian(D.Independent):  # type: ignore[type-arg]
    """Base of distributions of the action that :meth:`action` makes of a diagonal Gaussian x."""

    extra_noise = 0  # numbers that from_noise takes for a sample besides one for each dimension

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        *,
        low: Tensor,
        high: Tensor,
        varying: Tensor | None = None,
    ) -> None:
        self.low, self.high = low.to(loc.device), high.to(loc.device)
        self.varying = None if varying is None else varying.to(loc.device)
        super().__init__(D.Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def action(self, x: Tensor) -> Tensor:
        """The action, inside of ``[low, high]``, of a value of the Gaussian."""
        raise NotImplementedError

    def gaussian_log_prob(self, x: Tensor) -> Tensor:
        """Logarithm of the Gaussian's density, of each dimension."""
        normal = self.base_dist
        error = (x - normal.loc) / normal.scale
        return -(0.5 * error.square() + normal.scale.log() + HALF_LOG_2PI)

    def log_probs(self, value: Tensor) -> Tensor:
        """The logarithm of the density of each dimension of an action, ``(*B, A)``."""
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        if self.varying is not None:
            return self.masked_log_prob(value, self.varying)
        return self.log_probs(value).sum(-1)

    def masked_log_prob(self, value: Tensor, mask: Tensor) -> Tensor:
        """``log_prob`` of the dimensions where ``mask`` ``(*B, A)`` is true: ``(*B,)``."""
        mask = mask if self.varying is None else mask & self.varying
        return self.log_probs(value).where(mask, 0).sum(-1)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> _BoundedGaussian:
        shape = (*batch_shape, *self.event_shape)
        loc, scale = self.base_dist.loc.expand(shape), self.base_dist.scale.expand(shape)
        return type(self)(loc, scale, low=self.low, high=self.high, varying=self.varying)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.action(self.base_dist.loc)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Samples ``(*N, *B, A)`` from standard normal ``noise`` ``(*N, *B, A)``."""
        return self.action(self.base_dist.loc + self.base_dist.scale * noise)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.action(super().rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


class ClippedGaussian(_BoundedGaussian):
    """Diagonal Gaussian whose samples are clipped to ``[low, high]``; its density is not.

    ``loc``, ``scale``: ``(*B, A)``. Logged actions on the bounds have an ordinary log-probability,
    unlike under a squashed Gaussian. The official IQL code clips at sampling too.
    """

    def action(self, x: Tensor) -> Tensor:
        return _clip(x, self.low, self.high)

    def log_probs(self, value: Tensor) -> Tensor:
        return self.gaussian_log_prob(value)


class SquashedGaussian(_BoundedGaussian):
    """``centre + half_range * tanh(x)`` with x a diagonal Gaussian: TorchRL's ``TanhNormal``.

    ``loc``, ``scale`` of x: ``(*B, A)``; centre and half range are of ``[low, high]``. Density and
    samples are those of ``TanhNormal``: the logarithm of the density at an action ``a`` is that of
    the Gaussian at ``x = atanh((a - centre) / half_range)`` less the sum of
    ``log(half_range * (1 - tanh(x)**2))``. The tanh is clamped to ``1 - resolution`` of its dtype,
    so an action on a bound has a finite, very negative log-probability.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        *,
        low: Tensor,
        high: Tensor,
        varying: Tensor | None = None,
    ) -> None:
        super().__init__(loc, scale, low=low, high=high, varying=varying)
        self.centre, self.half_range = (self.high + self.low) / 2, (self.high - self.low) / 2
        self.unit = self.half_range
        if self.varying is not None:
            self.unit = self.half_range.where(self.varying, 1.0)

    def action(self, x: Tensor) -> Tensor:
        limit = 1 - torch.finfo(x.dtype).resolution
        return self.centre + self.half_range * x.tanh().clamp(-limit, limit)

    def log_probs(self, value: Tensor) -> Tensor:
        y = (value - self.centre) / self.unit
        limit = 1 - torch.finfo(y.dtype).resolution
        x = y.clamp(-limit, limit).atanh()
        slope = 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
        return self.gaussian_log_prob(x) - slope - self.unit.log()


class ClippedMixture(D.MixtureSameFamily):
    """Mixture of M diagonal Gaussians, samples clipped to ``[low, high]``.

    ``logits``: ``(*B, M)``; ``loc``, ``scale``: ``(*B, M, A)``. The deterministic sample is the mean
    of the component that is densest at its own mean.
    """

    extra_noise = 1

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, *,
        low: Tensor, high: Tensor, varying: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.low, self.high, self.loc, self.scale = low, high, loc, scale
        self.varying = varying
        normal = D.Normal(loc, scale, validate_args=False)
        components = D.Independent(normal, 1, validate_args=False)
        weights = D.Categorical(logits=logits, validate_args=False)
        super().__init__(weights, components, validate_args=False)

    @property
    def mode(self) -> Tensor:
        density = self.mixture_distribution.logits - self.scale.log().sum(-1)
        best = density.argmax(-1)[..., None, None].expand_as(self.loc[..., :1, :])
        return _clip(self.loc.gather(-2, best).squeeze(-2), self.low, self.high)

    deterministic_sample = mode

    def from_noise(self, noise: Tensor) -> Tensor:
        """Samples ``(*N, *B, A)`` from standard normal ``noise`` ``(*N, *B, A + 1)``.

        The last number chooses the component, by its quantile; the others are its sample.
        """
        quantile = torch.special.ndtr(noise[..., -1:])
        ends = self.mixture_distribution.probs.cumsum(-1)[..., :-1]
        chosen = (quantile >= ends).sum(-1)[..., None, None]
        shape = (*noise.shape[:-1], *self.loc.shape[-2:])
        index = chosen.expand(*noise.shape[:-1], 1, shape[-1])
        loc, scale = (x.expand(shape).gather(-2, index).squeeze(-2) for x in (self.loc, self.scale))
        return _clip(loc + scale * noise[..., :-1], self.low, self.high)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return _clip(super().sample(torch.Size(sample_shape)), self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        if self.varying is not None:
            return self.masked_log_prob(value, self.varying)
        result: Tensor = super().log_prob(value)
        return result

    def masked_log_prob(self, value: Tensor, mask: Tensor) -> Tensor:
        """``log_prob`` of the dimensions where ``mask`` ``(*B, A)`` is true: ``(*B,)``."""
        mask = mask if self.varying is None else mask & self.varying
        each = D.Normal(self.loc, self.scale, validate_args=False).log_prob(value.unsqueeze(-2))
        of_components = each.where(mask.unsqueeze(-2), 0).sum(-1)
        return (self.mixture_distribution.logits + of_components).logsumexp(-1)


class Choice(D.Categorical):
    """Choice among N by ``logits`` ``(*B, N)``, where ``mask`` (bool, ``(*B, N)``) allows.

    Samples are indices, int64 ``(*B,)``. Ties of the deterministic sample go to the first action.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        super().__init__(logits=_allowed(logits, mask), validate_args=False)

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    deterministic_sample = mode


class OneHotChoice(D.OneHotCategorical):
    """One-hot choice among N by ``logits`` ``(*B, N)``, where ``mask`` (bool, ``(*B, N)``) allows.

    Samples have the spec's ``dtype``. Ties of the deterministic sample go to the first action.
    """

    def __init__(
        self, logits: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.bool
    ) -> None:
        self.dtype = dtype
        super().__init__(logits=_allowed(logits, mask), validate_args=False)

    @property
    def mode(self) -> Tensor:
        return nn.functional.one_hot(self.logits.argmax(-1), self.logits.shape[-1]).to(self.dtype)

    deterministic_sample = mode

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.to(self.logits.dtype))


def _allowed(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits if mask is None else logits.masked_fill(~mask, -torch.inf)


def _clip(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(action, low.to(action)), high.to(action))


class Head(AroundPerceptron):
    """Base of the policies' networks: preprocess, MLP, affine map of [-1, 1] to the spec's bounds.

    ``limits``: the bounds, also the keyword arguments of the policy's distribution, which move with
    this module. They are not buffers: the state has centre and half range already. ``log_std``: a
    parameter of the shape ``log_std_shape``; None without it.

    A dimension whose bounds are equal but for rounding is constant: every action has its centre
    there, and it does not count in log-probabilities. Where there is one, ``limits`` has ``varying``,
    the mask of the others ``(A,)``. ``unit``, of standard deviations: the half range, 1 where constant.
    """

    centre: Tensor
    half_range: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bounds: Bounds | None,
        log_std_shape: Sequence[int] | None = None,
        **network: Any,
    ) -> None:
        super().__init__(in_features, out_features, **network)
        self.limits: dict[str, Tensor] = {}
        if bounds is not None:
            low, high = bounds
            self.limits = {"low": low, "high": high}
            self.register_buffer("centre", (high + low) / 2)
            self.register_buffer("half_range", (high - low) / 2)
            constant = high - low <= rounding(np.float32) * torch.maximum(low.abs(), high.abs())
            if bool(constant.any()):
                self.limits["varying"] = ~constant
        self.log_std = None if log_std_shape is None else nn.Parameter(torch.zeros(*log_std_shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Head:
        super()._apply(fn, *args, **kwargs)
        for name, bound in self.limits.items():
            self.limits[name] = fn(bound)
        return self

    @property
    def unit(self) -> Tensor:
        varying = self.limits.get("varying")
        return self.half_range if varying is None else self.half_range.where(varying, 1.0)

    def inside(self, x: Tensor) -> Tensor:
        return self.centre + self.half_range * x.tanh()


class GaussianHead(Head):
    """Mean inside the bounds; log-std the parameter (the paper's), or an output of the MLP."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = super().forward(*inputs)
        out, log_std = out.chunk(2, -1) if self.log_std is None else (out, self.log_std)
        std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * self.unit
        return self.inside(out), std.expand_as(out)


class SquashedHead(Head):
    """Location before the tanh, and a state-dependent scale."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_std = super().forward(*inputs).chunk(2, -1)
        return loc, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()


class DeterministicHead(Head):
    """The action."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inside(super().forward(*inputs))


class MixtureHead(Head):
    """Logits of M components, their means inside the bounds, and their standard deviations."""

    log_std: nn.Parameter

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.log_std.shape[-2:]
        logits, loc = super().forward(*inputs).split([shape[0], shape.numel()], -1)
        loc = self.inside(loc.unflatten(-1, shape))
        std = self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp() * self.unit
        return logits, loc, std.expand_as(loc)
