"""Action distributions that stay inside a spec: clipped and squashed Gaussians, mixtures, choices.

None of them checks its arguments: such a check reads a tensor, which on a GPU waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as D

__all__ = ["Choice", "ClippedGaussian", "ClippedMixture", "OneHotChoice", "SquashedGaussian"]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class ClippedGaussian(D.Independent):  # type: ignore[type-arg]
    """Diagonal Gaussian whose samples are clipped to ``[low, high]``; its density is not.

    ``loc``, ``scale``: ``(*B, A)``. Logged actions on the bounds have an ordinary log-probability,
    unlike under a squashed Gaussian. The official IQL code clips at sampling too.
    """

    def __init__(self, loc: Tensor, scale: Tensor, *, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        super().__init__(D.Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> ClippedGaussian:
        shape = (*batch_shape, *self.event_shape)
        loc, scale = self.base_dist.loc.expand(shape), self.base_dist.scale.expand(shape)
        return ClippedGaussian(loc, scale, low=self.low, high=self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        normal = self.base_dist
        error = (value - normal.loc) / normal.scale
        density: Tensor = -(0.5 * error.square() + normal.scale.log() + HALF_LOG_2PI).sum(-1)
        return density

    @property
    def deterministic_sample(self) -> Tensor:
        return _clip(self.mean, self.low, self.high)

    @staticmethod
    def noise_features(size: int) -> int:
        """Standard normal numbers that one sample of A = ``size`` dimensions is made from: A."""
        return size

    def from_noise(self, noise: Tensor) -> Tensor:
        """Samples ``(*N, *B, A)`` from standard normal ``noise`` ``(*N, *B, A)``."""
        normal = self.base_dist
        return _clip(normal.loc + normal.scale * noise, self.low, self.high)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return _clip(super().rsample(torch.Size(sample_shape)), self.low, self.high)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


class SquashedGaussian(D.Independent):  # type: ignore[type-arg]
    """``centre + half_range * tanh(x)`` with x a diagonal Gaussian: TorchRL's ``TanhNormal``.

    ``loc``, ``scale`` of x: ``(*B, A)``; centre and half range are of ``[low, high]``. Density and
    samples are those of ``TanhNormal``: the logarithm of the density at an action ``a`` is that of
    the Gaussian at ``x = atanh((a - centre) / half_range)`` less the sum of
    ``log(half_range * (1 - tanh(x)**2))``. The tanh is clamped to ``1 - resolution`` of its dtype,
    so an action on a bound has a finite, very negative log-probability.
    """

    def __init__(self, loc: Tensor, scale: Tensor, *, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low.to(loc.device), high.to(loc.device)
        self.centre, self.half_range = (self.high + self.low) / 2, (self.high - self.low) / 2
        super().__init__(D.Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> SquashedGaussian:
        shape = (*batch_shape, *self.event_shape)
        loc, scale = self.base_dist.loc.expand(shape), self.base_dist.scale.expand(shape)
        return SquashedGaussian(loc, scale, low=self.low, high=self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        y = (value - self.centre) / self.half_range
        limit = 1 - torch.finfo(y.dtype).resolution
        x = y.clamp(-limit, limit).atanh()
        normal = self.base_dist
        error = (x - normal.loc) / normal.scale
        gaussian = -(0.5 * error.square() + normal.scale.log() + HALF_LOG_2PI)
        slope = 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
        density: Tensor = (gaussian - slope - self.half_range.log()).sum(-1)
        return density

    def squash(self, x: Tensor) -> Tensor:
        """The action of a value of the Gaussian, strictly between the bounds."""
        limit = 1 - torch.finfo(x.dtype).resolution
        return self.centre + self.half_range * x.tanh().clamp(-limit, limit)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.squash(self.base_dist.loc)

    @staticmethod
    def noise_features(size: int) -> int:
        """Standard normal numbers that one sample of A = ``size`` dimensions is made from: A."""
        return size

    def from_noise(self, noise: Tensor) -> Tensor:
        """Samples ``(*N, *B, A)`` from standard normal ``noise`` ``(*N, *B, A)``."""
        return self.squash(self.base_dist.loc + self.base_dist.scale * noise)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.squash(super().rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


class ClippedMixture(D.MixtureSameFamily):
    """Mixture of M diagonal Gaussians, samples clipped to ``[low, high]``.

    ``logits``: ``(*B, M)``; ``loc``, ``scale``: ``(*B, M, A)``. The deterministic sample is the mean
    of the component that is densest at its own mean.
    """

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, *, low: Tensor, high: Tensor
    ) -> None:
        self.low, self.high = low, high
        components = D.Independent(
            D.Normal(loc, scale, validate_args=False), 1, validate_args=False
        )
        weights = D.Categorical(logits=logits, validate_args=False)
        super().__init__(weights, components, validate_args=False)

    @property
    def mode(self) -> Tensor:
        normal: Any = self.component_distribution.base_dist  # type: ignore[attr-defined]
        density = self.mixture_distribution.logits - normal.scale.log().sum(-1)
        best = density.argmax(-1)[..., None, None].expand_as(normal.loc[..., :1, :])
        return _clip(normal.loc.gather(-2, best).squeeze(-2), self.low, self.high)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.mode

    @staticmethod
    def noise_features(size: int) -> int:
        """Standard normal numbers that one sample of A = ``size`` dimensions is made from: A + 1."""
        return size + 1

    def from_noise(self, noise: Tensor) -> Tensor:
        """Samples ``(*N, *B, A)`` from standard normal ``noise`` ``(*N, *B, A + 1)``.

        The last number chooses the component, by its quantile; the others are its sample.
        """
        normal: Any = self.component_distribution.base_dist  # type: ignore[attr-defined]
        quantile = torch.special.ndtr(noise[..., -1:])
        ends = self.mixture_distribution.probs.cumsum(-1)[..., :-1]
        chosen = (quantile >= ends).sum(-1)[..., None, None]
        shape = (*noise.shape[:-1], *normal.loc.shape[-2:])
        index = chosen.expand(*noise.shape[:-1], 1, shape[-1])
        loc, scale = (
            x.expand(shape).gather(-2, index).squeeze(-2) for x in (normal.loc, normal.scale)
        )
        return _clip(loc + scale * noise[..., :-1], self.low, self.high)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return _clip(super().sample(torch.Size(sample_shape)), self.low, self.high)


class Choice(D.Categorical):
    """Choice among N by ``logits`` ``(*B, N)``, where ``mask`` (bool, ``(*B, N)``) allows.

    Samples are indices, int64 ``(*B,)``. Ties of the deterministic sample go to the first action.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        super().__init__(logits=logits, validate_args=False)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.logits.argmax(-1)

    @property
    def mode(self) -> Tensor:
        return self.deterministic_sample


class OneHotChoice(D.OneHotCategorical):
    """One-hot choice among N by ``logits`` ``(*B, N)``, where ``mask`` (bool, ``(*B, N)``) allows.

    Samples have the spec's ``dtype``. Ties of the deterministic sample go to the first action.
    """

    def __init__(
        self, logits: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype = torch.bool
    ) -> None:
        self.dtype = dtype
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        super().__init__(logits=logits, validate_args=False)

    @property
    def deterministic_sample(self) -> Tensor:
        return nn.functional.one_hot(self.logits.argmax(-1), self.logits.shape[-1]).to(self.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(torch.Size(sample_shape)).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        return self.deterministic_sample

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.to(self.logits.dtype))


def _clip(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(action, low.to(action)), high.to(action))
